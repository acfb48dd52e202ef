"""SIGTERM and Ctrl-C as a wish: the loop finishes its step, saves and leaves. A second Ctrl-C interrupts at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def stop_wish() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets. Outside the main thread nothing is caught."""
    wish = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return

    def on_signal(number: int, _: FrameType | None) -> None:
        wish.set()
        signal.signal(number, before[number])

    before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, on_signal)
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
