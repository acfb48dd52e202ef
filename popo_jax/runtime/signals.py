"""SIGTERM and Ctrl-C as a wish: the loop finishes its step, saves and leaves. A second Ctrl-C interrupts at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_wishes: list[threading.Event] = []
"""The wish that is listened for, if any: a process has one set of signal handlers."""


@contextlib.contextmanager
def stop_wish() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets; within another `stop_wish`, that one's. Outside the main thread nothing is
    caught. A second SIGTERM changes nothing: SLURM and systemd send it to parent and child, and the parent hands its own on.
    """
    if _wishes:
        yield _wishes[0]
        return
    wish = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return

    def on_signal(number: int, _: FrameType | None) -> None:
        wish.set()
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, on_signal)
    _wishes.append(wish)
    try:
        yield wish
    finally:
        _wishes.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
