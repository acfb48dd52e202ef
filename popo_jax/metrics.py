"""What a set of graded answers amounts to: avg@k, unbiased pass@k, and how far chance may have moved them. Plain numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from popo_jax.types import EPSILON

RESAMPLES = 10_000
"""Of the problems, for an interval."""
LEVEL = 0.95
_AT_ONCE = 250
"""Resamples in memory together."""


def pass_at(n: int, c: int, k: int) -> float:
    """Unbiased pass@k of one problem: 1 - C(n - c, k) / C(n, k), of n samples of which c are right (Chen et al. 2021, eq. 1).

    The chance that k of the n samples, drawn without replacement, hold a right one. As a product, 1 - prod (1 - k / i) over
    i = n - c + 1 .. n, which never overflows. Errors: ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@k needs k from 1 to the {n} samples and 0 to {n} right ones, got k = {k} and {c} right")
    if n - c < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)))


def right(correct: Sequence[float]) -> int:
    """How many of a problem's samples count as right: those of at least 1 - 1e-6."""
    return sum(x >= 1 - EPSILON for x in correct)


def powers(k: int) -> list[int]:
    """1, 2, 4, ... up to k, and k."""
    return sorted({1 << i for i in range(k.bit_length())} | {k})


def measures(samples: Sequence[Sequence[float]], ks: Sequence[int]) -> dict[str, np.ndarray]:
    """avg@n and pass@k for each of `ks`, a value for every problem: float64 [N]; a metric is the mean of its values.

    samples: for each problem how correct each of its samples is, in [0, 1]. Every problem counts once: avg is the mean of its
    own samples, pass@k takes its own n. Where n differs, the name is avg@LEAST-MOST. Errors: ValueError for k above the least n.
    """
    sizes = [len(s) for s in samples]
    name = f"avg@{min(sizes)}" + (f"-{max(sizes)}" if max(sizes) > min(sizes) else "")
    out = {name: np.array([float(np.mean(s)) for s in samples])}
    return out | {f"pass@{k}": np.array([pass_at(len(s), right(s), k) for s in samples]) for k in ks}


def interval(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values` [N]: percentile bootstrap over the N problems (Efron 1979), RESAMPLES times.

    It speaks of other problems of this kind; samples are not drawn anew. One problem gives no width.
    """
    rng, n = np.random.default_rng(seed), len(values)
    means: list[np.ndarray] = []
    draw: Callable[[int], np.ndarray] = lambda size: values[rng.integers(0, n, (size, n))].mean(axis=1)  # noqa: E731
    for done in range(0, RESAMPLES, _AT_ONCE):
        means.append(draw(min(_AT_ONCE, RESAMPLES - done)))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
