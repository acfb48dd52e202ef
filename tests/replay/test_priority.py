"""Priority by hand, and the order with its ties."""

from __future__ import annotations

import numpy as np
import pytest

from popo_jax.replay.priority import best_first, newest_first, priority
from tests.replay import make


def of(version: int, mean: float = 0.5, id: int = 0):
    """A group of 4 rows with mean correctness `mean`."""
    return make.group(id, version=version, correct=np.array([mean] * 4, np.float32))


def test_priority_halves_with_every_half_life():
    c = make.config(half_life=4.0)
    np.testing.assert_array_equal(priority(np.array([0, 4, 8, 2]), np.array([0.1, 0.5, 0.9, 0.5]), c), [1, 0.5, 0.25, 0.5**0.5])


def test_quality_is_the_normalised_variance():
    c = make.config(half_life=4.0, quality="variance")
    got = priority(np.array([0, 0, 0, 4, 1]), np.array([0.5, 0.25, 1.0, 0.25, np.nan]), c)
    np.testing.assert_array_equal(got, [1, 0.75, 0, 0.375, 0])


def test_order_by_version_then_uses_then_place():
    groups = [of(3), of(5), of(5), of(4), of(5)]
    for quality in ("uniform", "variance"):
        c = make.config(quality=quality)
        assert best_first(groups, [0, 1, 0, 0, 0], c, version=6).tolist() == [2, 4, 1, 3, 0]
    assert newest_first(groups, [0, 1, 0, 0, 0]).tolist() == [2, 4, 1, 3, 0]


def test_priority_goes_before_version():
    # half-life 2, ages 4, 2, 0: 1 * 1/4, 7/16 * 1/2, 15/64
    groups = [of(2, 1 / 2), of(4, 1 / 8), of(6, 1 / 16)]
    assert best_first(groups, [0] * 3, make.config(quality="variance", half_life=2.0), version=6).tolist() == [0, 2, 1]


def test_of_equal_priorities_the_newer_version_goes_first_even_if_used_more():
    # 60/64 * 1/4 at age 4 and 15/64 at age 0, exactly equal
    groups, c = [of(2, 6 / 16), of(6, 1 / 16)], make.config(quality="variance", half_life=2.0)
    assert priority(np.array([4]), np.array([6 / 16]), c) == priority(np.array([0]), np.array([1 / 16]), c)
    assert best_first(groups, [0, 3], c, version=6).tolist() == [1, 0]


@pytest.mark.parametrize("half_life", [1e-3, 4.0])
def test_pure_recency_is_exact_where_the_power_underflows(half_life):
    groups = [of(0), of(2), of(1), of(3)]
    assert best_first(groups, [0] * 4, make.config(half_life=half_life), version=10**7).tolist() == [3, 1, 2, 0]
    assert (priority(np.array([10**7]), np.array([0.5]), make.config(half_life=half_life)) == 0).all()


def test_nothing_stored_has_an_order_too():
    for quality in ("uniform", "variance"):
        assert best_first([], [], make.config(quality=quality), version=3).tolist() == []
