"""Who used the processor during a round, from /proc. Linux only; times in seconds, one hundredth exact."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
IDLE = (3, 4)
"""Columns of /proc/stat that are not work: idle, iowait. Stolen time counts as somebody else's work."""
GUEST = 8
"""From this column on, time is counted a second time."""


@dataclass(frozen=True)
class Use:
    """CPU seconds so far: of some cores by anybody, and of each process."""

    busy: float
    own: dict[int, float]


def use(cores: Collection[int], pids: Collection[int]) -> Use:
    return Use(busy(Path("/proc/stat").read_text(), cores), {pid: process(Path(f"/proc/{pid}/stat").read_text()) for pid in pids})


def busy(stat: str, cores: Collection[int]) -> float:
    """CPU seconds that `cores` have worked since boot."""
    total = 0
    for line in stat.splitlines():
        name, *columns = line.split()
        if name in {f"cpu{i}" for i in cores}:
            total += sum(int(x) for i, x in enumerate(columns[:GUEST]) if i not in IDLE)
    return total / TICK


def process(stat: str) -> float:
    """CPU seconds of a process and all its threads, user and system."""
    columns = stat.rpartition(")")[2].split()
    return (int(columns[11]) + int(columns[12])) / TICK


def peak_mb(pid: int) -> float:
    """Largest resident memory of a process so far, MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def shares(before: Use, after: Use, *, running: int, idle: Collection[int], seconds: float, cores: int) -> tuple[float, float]:
    """(share of the cores' time that went neither to `running` nor to idleness, share that the waiting contestants took).

    The second is part of the first. 0 is a quiet machine, 1 all cores taken by others.
    """
    spent = {pid: after.own[pid] - before.own[pid] for pid in before.own}
    whole = seconds * cores
    others = (after.busy - before.busy - spent[running]) / whole
    return max(others, 0.0), sum(spent[pid] for pid in idle) / whole
