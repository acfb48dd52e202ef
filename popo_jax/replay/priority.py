"""Which stored group is better: by recency, or by recency and quality together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from popo_jax.config import ReplayConfig
from popo_jax.types import Group


def priority(ages: np.ndarray, correct_mean: np.ndarray, c: ReplayConfig) -> np.ndarray:
    """quality * 0.5^(age / half_life), float64 [n] (ours; the paper orders by recency alone).

    quality is 1, or with `variance` 4 p (1 - p): the variance of a right-or-wrong reward over its largest value, p the
    group's mean correctness. `ages` in policy updates. A group whose correctness is not finite has priority 0.
    """
    decay = 0.5 ** (np.asarray(ages, np.float64) / c.half_life)
    if c.quality == "uniform":
        return decay
    p = np.asarray(correct_mean, np.float64)
    return np.where(np.isfinite(p), 4 * p * (1 - p), 0.0) * decay


def priorities(groups: Sequence[Group], c: ReplayConfig, *, version: int) -> np.ndarray:
    """`priority` of each group at `version`, float64 [n]."""
    ages = np.array([version - g.version for g in groups], np.int64)
    return priority(ages, np.array([g.correct.mean(dtype=np.float64) for g in groups]), c)


def best_first(groups: Sequence[Group], uses: Sequence[int], c: ReplayConfig, *, version: int) -> np.ndarray:
    """Indices by priority descending, version descending, times used ascending, place in `groups` ascending.

    With quality `uniform` priority falls with age alone, so versions are compared instead: exact at any age, though
    0.5^x underflows.
    """
    if c.quality == "uniform":
        return newest_first(groups, uses)
    return np.lexsort((*_recency(groups, uses), -priorities(groups, c, version=version)))


def newest_first(groups: Sequence[Group], uses: Sequence[int]) -> np.ndarray:
    """Indices by version descending, times used ascending, place in `groups` ascending."""
    return np.lexsort(_recency(groups, uses))


def _recency(groups: Sequence[Group], uses: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sort keys, the weightiest last; lexsort is stable, which leaves ties in their place."""
    return np.asarray(uses, np.int64), -np.array([g.version for g in groups], np.int64)
