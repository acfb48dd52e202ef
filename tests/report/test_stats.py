"""Statistics of the report against their definitions: exact fractions, plain loops, the equations that they solve."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from popo_jax.report import counts, curves


@pytest.mark.parametrize(("k", "n"), [(0, 5), (1, 7), (50, 100), (99, 100), (5, 5), (3, 250_000)])
def test_ends_of_wilsons_interval_are_just_not_rejected(k, n):
    """At both ends p0 the score test (p - p0) / sqrt(p0 (1 - p0) / n) is the normal point; by bisection of that."""

    def z(p0):
        return abs(k / n - p0) / math.sqrt(p0 * (1 - p0) / n)

    low, high = map(float, curves.wilson(np.array(k / n), n))
    for end, (inside, outside) in {low: (k / n, 1e-15), high: (k / n, 1 - 1e-15)}.items():
        if k in (0, n) and abs(end - k / n) < 1e-9:
            continue
        for _ in range(200):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if z(middle) < counts.Z95 else (inside, middle)
        assert end == pytest.approx(inside, rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 9, 40, 301])
def test_the_sign_test_is_exact(n):
    for up in {0, 1, n // 3, n // 2, n}:
        tail = sum(Fraction(math.comb(n, i), 2**n) for i in range(min(up, n - up) + 1))
        assert counts.sign_test(up, n - up) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-10)


def test_holm_rejects_what_stepping_down_rejects():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.random(int(rng.integers(1, 12))) ** 3
        for level in (0.01, 0.05, 0.2, 0.6):
            rejected = set()
            for left, i in zip(range(len(p), 0, -1), np.argsort(p), strict=True):
                if p[i] > level / left:
                    break
                rejected.add(int(i))
            assert {i for i, a in enumerate(counts.holm(p.tolist())) if a <= level} == rejected


def test_paired_intervals_cover():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(400):
        before, after = rng.random(80) < 0.4, rng.random(80) < 0.6
        mean, low, high = counts.paired_interval(after.astype(float) - before)
        d = [float(a) - float(b) for a, b in zip(after, before, strict=True)]
        s = math.sqrt(sum((v - sum(d) / 80) ** 2 for v in d) / 79)
        assert (mean, low) == (pytest.approx(sum(d) / 80), pytest.approx(sum(d) / 80 - 1.96 * s / math.sqrt(80), abs=1e-4))
        hits += low <= 0.2 <= high
    assert 0.91 < hits / 400 < 0.98


def test_rolling_by_loops():
    x = np.random.default_rng(2).normal(size=60)
    x[[0, 1, 7, 8, 9, 30]] = np.nan
    for window in (1, 3, 100):
        for i, got in enumerate(curves.rolling(x, window)):
            seen = [v for v in x[max(0, i - window + 1) : i + 1] if not math.isnan(v)]
            assert got == pytest.approx(sum(seen) / len(seen)) if seen else math.isnan(got)
    assert len(curves.rolling(np.array([]), 5)) == 0


@pytest.mark.parametrize("runs", [1, 2, 4, 5, 9])
def test_bands_by_loops(runs):
    x = np.random.default_rng(3).normal(size=(runs, 30))
    x[0, :5] = np.nan
    for i, got in enumerate(zip(*curves.band(x), strict=True)):
        seen = [v for v in x[:, i] if not math.isnan(v)]
        if len(seen) < 2:
            assert math.isnan(got[1]) and math.isnan(got[2])
            continue
        error = 1.96 * float(np.std(seen, ddof=1)) / math.sqrt(len(seen))
        ends = (min(seen), max(seen)) if len(seen) < 5 else (np.mean(seen) - error, np.mean(seen) + error)
        assert got == (pytest.approx(np.mean(seen)), pytest.approx(ends[0], abs=1e-4), pytest.approx(ends[1], abs=1e-4))
