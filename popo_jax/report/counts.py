"""Counting statistics of sections: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054
"""97.5 % point of the standard normal distribution."""


def binomial_tail(k: int, n: int, p: float) -> float:
    """P(X <= k) of X ~ Binomial(n, p), in logarithms, so that it does not underflow before the sum does."""
    if k < 0:
        return 0.0
    if k >= n or p <= 0.0:
        return 1.0
    if p >= 1.0:
        return 0.0
    whole = math.lgamma(n + 1)
    terms = [
        whole - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p) for i in range(k + 1)
    ]
    top = max(terms)
    return min(1.0, math.exp(top) * math.fsum(math.exp(t - top) for t in terms))


def sign_test(up: int, down: int) -> float:
    """Two-sided p of `up` rises against `down` falls if either is as likely: exact sign test, McNemar's for 0/1. 1 for none."""
    return min(1.0, 2.0 * binomial_tail(min(up, down), up + down, 0.5)) if up + down else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """p adjusted for all of them together: max over the smaller ones of p_(i) (n - i + 1), at most 1. Holm 1979."""
    out, worst, n = [1.0] * len(p), 0.0, len(p)
    for rank, i in enumerate(sorted(range(n), key=lambda i: p[i])):
        worst = max(worst, p[i] * (n - rank))
        out[i] = min(1.0, worst)
    return out


def gini(x: np.ndarray) -> float:
    """Gini coefficient of amounts >= 0: 0 all equal, towards 1 all in one hand. NaN for none, or all 0."""
    x = np.sort(np.asarray(x, float))
    n, total = len(x), float(x.sum())
    if not n or total <= 0:
        return math.nan
    return float(2 * (np.arange(1, n + 1) * x).sum() / (n * total) - (n + 1) / n)


def paired_interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean of differences and its 95 % normal interval, mean -+ 1.96 s / sqrt(n). No interval (NaN) for less than 2."""
    d = np.asarray(differences, float)
    if not len(d):
        return math.nan, math.nan, math.nan
    mean = float(d.mean())
    half = Z95 * float(d.std(ddof=1)) / math.sqrt(len(d)) if len(d) > 1 else math.nan
    return mean, mean - half, mean + half
