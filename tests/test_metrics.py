"""avg@k, pass@k and their intervals: by hand, against all subsets, and where naive formulas overflow."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from popo_jax import metrics


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_is_the_share_of_subsets_that_hold_a_right_one(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([i < c for i in range(n)], k))
            assert metrics.pass_at(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets), abs=1e-12)


def test_pass_at_of_many_samples_stays_finite():
    """One right of 10^5: the chance to be among k is k / n."""
    assert metrics.pass_at(10**5, 1, 10**4) == pytest.approx(0.1, rel=1e-9)
    assert metrics.pass_at(10**5, 0, 10**5) == 0
    assert metrics.pass_at(10**5, 1, 10**5) == 1


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1), (0, 0, 1)])
def test_pass_at_refuses_what_cannot_be_drawn(n, c, k):
    with pytest.raises(ValueError, match="pass@k needs k from 1 to"):
        metrics.pass_at(n, c, k)


def test_measures_by_hand():
    """
    samples      n  c  avg   pass@1  pass@2            pass@4
    1 0 0 0      4  1  1/4   1/4     1 - 3/6 = 1/2     1
    1 0 1 0      4  2  1/2   1/2     1 - 1/6 = 5/6     1
    0 0 0 0      4  0  0     0       0                 0
    """
    m = metrics.measures([[1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]], [1, 2, 4])
    assert list(m) == ["avg@4", "pass@1", "pass@2", "pass@4"]
    np.testing.assert_allclose(m["avg@4"], [1 / 4, 1 / 2, 0])
    np.testing.assert_allclose(m["pass@2"], [1 / 2, 5 / 6, 0])
    np.testing.assert_allclose(m["pass@4"], [1, 1, 0])


def test_every_problem_counts_once_however_often_it_was_sampled():
    """2 samples, 1 right, and 4, 4 right: the mean of 1/2 and 1, not 5/6."""
    m = metrics.measures([[1, 0], [1, 1, 1, 1]], [1, 2])
    assert m["avg@2-4"].mean() == 3 / 4 and m["pass@1"].mean() == 3 / 4 and m["pass@2"].mean() == 1


def test_partly_right_is_in_the_average_and_not_in_pass():
    m = metrics.measures([[0.5, 1]], [1])
    assert m["avg@2"] == [0.75] and m["pass@1"] == [0.5]


def test_powers():
    assert metrics.powers(1) == [1] and metrics.powers(16) == [1, 2, 4, 8, 16] and metrics.powers(6) == [1, 2, 4, 6]


def test_an_interval_is_that_of_the_binomial():
    """100 problems, 30 solved: the mean of a resample is Binomial(100, 0.3) / 100, with quantiles 0.21 and 0.39."""
    values = np.repeat([1.0, 0.0], [30, 70])
    low, high = metrics.interval(values)
    assert (low, high) == pytest.approx((0.21, 0.39), abs=0.0101)
    assert metrics.interval(values) == (low, high)
    assert metrics.interval(np.array([0.25])) == (0.25, 0.25)
