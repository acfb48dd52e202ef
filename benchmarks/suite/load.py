"""What other processes took from the machine while a case was measured: a figure taken beside a busy neighbour is no figure."""

from __future__ import annotations

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")


class Load:
    """`load = Load()`, work, `load.others()`."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.monotonic(), busy(), own()

    def others(self) -> float | None:
        """Cores that others kept busy on average since then; None where /proc/stat does not tell."""
        now, seconds = busy(), time.monotonic() - self._began
        if now is None or self._busy is None or seconds <= 0:
            return None
        return max(now - self._busy - (own() - self._own), 0.0) / seconds


def busy() -> float | None:
    """CPU seconds of all processes since the machine's start, those a hypervisor gave to others included."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, STAT.read_text().splitlines()[0].split()[1:9])
    except (OSError, ValueError, IndexError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])
