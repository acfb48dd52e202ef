"""Raw results back in memory, and the few numbers that tables and figures are made of.

Accuracy is held-out; "smoothed" is the mean of an evaluation and the two before it (what there is of them). A run that
stopped by itself keeps its last accuracy to the end of the grid.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

WINDOW = 3
LEVEL, RESAMPLES = 0.95, 2000


@dataclass(frozen=True, eq=False)
class Run:
    ending: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    def column(self, key: str) -> np.ndarray:
        """float64 [steps], NaN where the row has none; row 0 (the first evaluation) left out."""
        return np.array([r[key] if r.get(key) is not None else np.nan for r in self.rows[1:]], float)

    def total(self, key: str) -> float:
        return float(self.rows[-1].get(key) or 0)


Key = tuple[str, str, int]
"""Task, algorithm, group size."""


def load(folder: Path) -> dict[Key, list[Run]]:
    """Finished runs by (task, algorithm, group size), seeds ascending."""
    found: dict[Key, list[Run]] = {}
    for path in sorted(folder.glob("*/*.json")):
        ending = json.loads(path.read_text())
        with gzip.open(path.with_suffix(".jsonl.gz"), "rt") as f:
            rows = [json.loads(line) for line in f]
        key = (ending["task"], ending["algorithm"], ending["group_size"])
        found.setdefault(key, []).append(Run(ending, rows))
    return {k: sorted(runs, key=lambda r: r.ending["seed"]) for k, runs in found.items()}


def grid(runs: Sequence[Run]) -> np.ndarray:
    """int [n]: the steps at which the longest run was evaluated."""
    return max((np.array([r["step"] for r in run.rows if r.get("eval/accuracy") is not None]) for run in runs), key=len)


def accuracy(runs: Sequence[Run], *, smooth: bool) -> np.ndarray:
    """float [seeds, n] on `grid`."""
    steps = grid(runs)
    out = np.empty((len(runs), len(steps)))
    for i, run in enumerate(runs):
        at = {r["step"]: r["eval/accuracy"] for r in run.rows if r.get("eval/accuracy") is not None}
        last = np.nan
        for j, step in enumerate(steps):
            out[i, j] = last = at.get(int(step), last)
    if not smooth:
        return out
    return np.stack([out[:, max(0, j + 1 - WINDOW) : j + 1].mean(axis=1) for j in range(len(steps))], axis=1)


def responses(runs: Sequence[Run]) -> np.ndarray:
    """float [seeds, n]: responses generated up to each step of the grid."""
    steps = grid(runs)
    totals = [np.array([0.0, *(r["rollouts_total"] for r in run.rows[1:])]) for run in runs]
    return np.stack([t[np.minimum(steps, len(t) - 1)] for t in totals])


def final(runs: Sequence[Run]) -> np.ndarray:
    """float [seeds]: smoothed accuracy of the last evaluation."""
    return accuracy(runs, smooth=True)[:, -1]


def interval(values: np.ndarray) -> tuple[float, float]:
    """Percentile bootstrap of the mean over seeds (scipy). With three seeds it is rather too narrow. NaN for one seed."""
    if len(values) < 2:
        return float("nan"), float("nan")
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    got = stats.bootstrap(
        (values,), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    )
    return float(got.confidence_interval.low), float(got.confidence_interval.high)


@dataclass(frozen=True)
class Reach:
    """The first evaluation whose smoothed mean over seeds is at least a target; `inf` for never, `end` the last one's."""

    at: float
    low: float
    high: float
    end: float


def reach(runs: Sequence[Run], target: float, *, by: str) -> Reach:
    """`by` "steps" or "responses"; the interval resamples seeds (percentile bootstrap, scipy)."""
    curves = accuracy(runs, smooth=True)
    where = np.broadcast_to(grid(runs), curves.shape) if by == "steps" else responses(runs)

    def first(seeds: np.ndarray) -> float:
        good = np.flatnonzero(curves[seeds].mean(axis=0) >= target)
        return float(where[seeds].mean(axis=0)[good[0]]) if len(good) else beyond

    end = float(where[:, -1].mean())
    beyond = 2 * float(where.max())  # finite, so that percentiles stay defined
    every = np.arange(len(runs))
    low = high = at = first(every)
    if len(runs) > 1:
        got = stats.bootstrap(
            (every,),
            first,
            confidence_level=LEVEL,
            n_resamples=RESAMPLES // 4,
            method="percentile",
            vectorized=False,
            rng=np.random.default_rng(0),
        )
        low, high = got.confidence_interval.low, got.confidence_interval.high
    never = [float("inf") if x > where.max() else float(x) for x in (at, low, high)]
    return Reach(*never, end)


def mean_of(runs: Sequence[Run], key: str, *, last: int | None = None) -> float:
    """Mean over seeds of the mean over steps (the last `last` of them) of a metric, NaN where it never was."""
    columns = [c[~np.isnan(c)] for c in (r.column(key)[-last if last else None :] for r in runs)]
    return float(np.mean([c.mean() for c in columns if len(c)])) if any(len(c) for c in columns) else float("nan")
