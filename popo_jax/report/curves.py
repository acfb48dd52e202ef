"""Curves of a run's metrics: rolling means, intervals of shares, bands over seeds, and what else a point may stand over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from popo_jax.health import BY_KEY, finite
from popo_jax.report.counts import Z95
from popo_jax.report.frame import Series, Worry
from popo_jax.report.read import Metrics, Run

FEW = 5
"""Under so many curves a band is from the least to the most, else the mean -+ 1.96 standard errors."""


def wilson(share: np.ndarray, n: float) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a share among n (Wilson 1927); NaN stays."""
    z, p = Z95, np.asarray(share, float)
    n = max(n, 1)
    middle, width = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (middle - width) / (1 + z**2 / n), (middle + width) / (1 + z**2 / n)


def mean_interval(x: np.ndarray) -> tuple[float, float, float]:
    """Mean of values in [0, 1], one a problem, with its 95 % interval.

    Wilson's with as many answers as would vary like these: for values of 0 and 1 it is Wilson's own.
    """
    x = np.asarray(x, float)
    x = x[np.isfinite(x)]
    if not len(x):
        return math.nan, math.nan, math.nan
    mean, variance = float(x.mean()), float(x.var())
    n = len(x) * mean * (1 - mean) / variance if variance > 0 else float(len(x))
    low, high = wilson(np.array(mean), n)
    return mean, float(low), float(high)


def rolling(x: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values up to each that are numbers; NaN where none is."""
    known = np.isfinite(x)
    total, count = np.cumsum(np.where(known, x, 0.0)), np.cumsum(known)
    before = np.maximum(np.arange(len(x)) - window, -1)
    total = total - np.where(before >= 0, total[before], 0.0)
    count = count - np.where(before >= 0, count[before], 0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def window_of(n: int) -> int:
    """Of a rolling mean over n steps: a twentieth, at least 5."""
    return max(5, n // 20)


def band(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, lower, upper) over the rows of [runs, n], each point over the runs that have it. One run: no band (NaN)."""
    known = np.isfinite(curves)
    n = known.sum(axis=0)
    filled = np.where(known, curves, 0.0)
    mean = np.where(n > 0, filled.sum(axis=0) / np.maximum(n, 1), np.nan)
    squares = np.where(known, (curves - mean) ** 2, 0.0).sum(axis=0)
    error = Z95 * np.sqrt(squares / np.maximum(n - 1, 1) / np.maximum(n, 1))
    least = np.where(n < FEW, np.where(known, curves, np.inf).min(axis=0), mean - error)
    most = np.where(n < FEW, np.where(known, curves, -np.inf).max(axis=0), mean + error)
    return mean, np.where(n > 1, least, np.nan), np.where(n > 1, most, np.nan)


def seconds(metrics: Metrics) -> np.ndarray:
    """float [n]: wall-clock seconds of each row; of row 0 those of its evaluation."""
    took = metrics["time/step"]
    return np.where(np.isfinite(took), took, np.nan_to_num(metrics["time/eval"]))


def hours(metrics: Metrics) -> np.ndarray:
    """float [n]: hours of wall-clock time up to each row's end."""
    return np.cumsum(seconds(metrics)) / 3600


def places(metrics: Metrics, at: np.ndarray | None = None) -> Mapping[str, list[float]]:
    """What the rows (`at`: bool [n], None: all) stand over besides steps: responses, tokens, hours, those that are known."""
    found = {"responses": metrics["rollouts_total"], "tokens": metrics["tokens_generated_total"]}
    found = {k: np.where(metrics.step == 0, 0.0, v) for k, v in found.items()}
    found |= {"hours": hours(metrics)}
    chosen = slice(None) if at is None else at
    return {k: v[chosen].tolist() for k, v in found.items() if np.isfinite(v[chosen]).any()}


def series(run: Run, key: str, name: str | None = None) -> Series | None:
    """A metric over the steps that have it; None if none has."""
    x = run.metrics[key]
    known = np.isfinite(x)
    if not known.any():
        return None
    return Series(name or key, run.metrics.step[known].tolist(), x[known].tolist(), other_x=places(run.metrics, known))


def smoothed(run: Run, key: str, name: str) -> Series | None:
    """The rolling mean of `series`."""
    raw = series(run, key)
    if raw is None or len(raw.y) < 10:
        return None
    return Series(name, raw.x, rolling(np.array(raw.y), window_of(len(raw.y))).tolist(), other_x=raw.other_x)


def worry(run: Run, key: str) -> Worry | None:
    """The line of health of a metric; a relative one from the run's first rows.

    None where there is none, or where on average the rule is silent: ages do not matter without weights.
    """
    rule = BY_KEY.get(key)
    if rule is None:
        return None
    if rule.unless and run.metrics.has(rule.unless[0]) and np.nanmean(run.metrics[rule.unless[0]]) >= rule.unless[1]:
        return None
    limit = rule.limit
    if rule.relative:
        first = [v for r in run.metrics.rows if (v := finite(r.get(key))) is not None][: rule.window]
        if not first:
            return None
        limit *= sum(first) / len(first)
    return Worry(limit, rule.when, rule.advice)


def present(*found: Series | None) -> tuple[Series, ...]:
    return tuple(s for s in found if s is not None)


def resampled(run: Run, key: str, steps: Sequence[int]) -> np.ndarray:
    """float: a metric at each of `steps`, NaN where the run has it not."""
    known = dict(zip(run.metrics.step.tolist(), run.metrics[key].tolist(), strict=True))
    return np.array([known.get(s, math.nan) for s in steps], float)
