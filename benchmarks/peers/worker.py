"""A contestant's side of the protocol: JSON lines on stdin and stdout. Standard library only.

<- {"inputs": FOLDER, "case": CASE}          -> {"ready": true, "versions": {..}, "facts": {..}}
<- {"steps": n}                              -> {"seconds": wall seconds of n steps, "tokens": trained or sampled}
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

WARM = 6
"""Steps before the first that is timed: programs compile, memory is taken (a process that compiled is slower for five more)."""


class Channel:
    """The lines. What libraries print goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def receive(self) -> dict[str, Any]:
        """The next line; leaves the process when there is none."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # trainers own threads that would wait for each other
        return json.loads(line)

    def send(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()


class Gate:
    """Stands at the end of every step: counts, reports, and waits until the driver lets the next steps through.

    WARM steps pass before the contestant says that it is ready; `facts` may be filled in until then.
    """

    def __init__(self, packages: Sequence[str]) -> None:
        self.channel = Channel()
        task = self.channel.receive()
        self.inputs, self.case = Path(task["inputs"]), str(task["case"])
        self.facts: dict[str, Any] = {}
        self._packages, self._ready = packages, False
        self.left, self._tokens = WARM, 0
        self._began = time.perf_counter()

    def step(self, tokens: int, steps: int = 1) -> None:
        """`steps` more are done (at most `left`), in which `tokens` were sampled or trained. Returns when the next may begin."""
        now = time.perf_counter()
        self.left, self._tokens = self.left - steps, self._tokens + tokens
        if self.left > 0:
            return
        if self._ready:
            self.channel.send({"seconds": now - self._began, "tokens": self._tokens})
        else:
            self.channel.send({"ready": True, "versions": versions(self._packages), "facts": self.facts})
            self._ready = True
        self.left, self._tokens = int(self.channel.receive()["steps"]), 0
        self._began = time.perf_counter()


def micro_batch() -> int | None:
    """The command line's --micro-batch: rows per gradient accumulation; None: all rows of a step at once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--micro-batch", type=int)
    return parser.parse_args().micro_batch


def serve(gate: Gate, step: Callable[[], int]) -> NoReturn:
    """For contestants whose step is a function that returns its number of tokens."""
    while True:
        gate.step(step())


def versions(packages: Sequence[str]) -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
