"""Where a step's time goes: seconds per section, wall and CPU, from any thread."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """`with clock("sample"):` adds to `time/sample`; `take` returns what was added since and starts anew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wall: dict[str, float] = defaultdict(float)
        self._cpu: dict[str, float] = defaultdict(float)
        self._process = time.process_time()

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        wall, cpu = time.monotonic(), time.thread_time()
        try:
            yield
        finally:
            with self._lock:
                self._wall[section] += time.monotonic() - wall
                self._cpu[section] += time.thread_time() - cpu

    def take(self) -> dict[str, float]:
        """`time/<section>`, wall seconds; `cpu/replay` and `cpu/step`, CPU seconds of replay's thread and of the process."""
        with self._lock:
            row = {f"time/{name}": seconds for name, seconds in self._wall.items()}
            process = time.process_time()
            row |= {"cpu/replay": self._cpu["replay"], "cpu/step": process - self._process}
            self._wall.clear()
            self._cpu.clear()
            self._process = process
        return row
