"""Advantages by hand, and what must come out as exactly 0."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popo_jax.ops.advantages import KINDS, group_advantages
from popo_jax.types import UserError

LIBRARIES = {"numpy": np.asarray, "jax": jnp.asarray}


@pytest.fixture(params=LIBRARIES)
def array(request):
    """A maker of float32 arrays: both libraries must give the same."""
    return lambda x: LIBRARIES[request.param](np.asarray(x, np.float32))


# [0, 0, 0, 1]: mean 1/4, squared deviations 3/16 + 9/16 = 3/4, / 3 = 1/4, std 1/2.
# [1, 2, 3, 6]: mean 3, squared deviations 4 + 1 + 0 + 9 = 14, / 3, std 2.1602469.
# [0.1 x 7, 1]: mean 0.2125, squared deviations 7 x 0.1125^2 + 0.7875^2 = 0.70875, / 7 = 0.10125, std 0.31819805.
TABLE = [
    ("grpo", [0, 0, 0, 1], [-0.499999, -0.499999, -0.499999, 1.499997]),
    ("dr_grpo", [0, 0, 0, 1], [-0.25, -0.25, -0.25, 0.75]),
    ("rloo", [0, 0, 0, 1], [-1 / 3, -1 / 3, -1 / 3, 1.0]),
    ("grpo", [1, 2, 3, 6], [-0.9258197, -0.46290984, 0.0, 1.3887295]),
    ("dr_grpo", [1, 2, 3, 6], [-2.0, -1.0, 0.0, 3.0]),
    ("rloo", [1, 2, 3, 6], [-8 / 3, -4 / 3, 0.0, 4.0]),
    ("grpo", [0.1] * 7 + [1.0], [-0.3535523] * 7 + [2.474866]),
    ("dr_grpo", [0.1] * 7 + [1.0], [-0.1125] * 7 + [0.7875]),
    ("rloo", [0.1] * 7 + [1.0], [-0.12857143] * 7 + [0.9]),
    ("grpo", [1, 0], [0.7071058, -0.7071058]),
    ("rloo", [1, 0], [1.0, -1.0]),
]


@pytest.mark.parametrize("kind, rewards, expected", TABLE)
def test_by_hand(array, kind, rewards, expected):
    got = group_advantages(array([rewards, rewards[::-1]]), kind=kind)
    np.testing.assert_allclose(got, [expected, expected[::-1]], atol=4e-7, rtol=4e-7)


def test_result_is_of_the_library_that_came_in():
    for dtype in (np.float32, np.float64, np.int64):
        got = group_advantages(np.array([[0, 1]], dtype), kind="grpo")
        assert type(got) is np.ndarray and got.dtype == np.float32
    got = group_advantages(jnp.array([[0, 1]], jnp.bfloat16), kind="grpo")
    assert isinstance(got, jax.Array) and got.dtype == jnp.float32
    assert jax.eval_shape(lambda r: group_advantages(r, kind="rloo"), jnp.zeros((3, 4))).shape == (3, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "group", [[0.1] * 7, [0.0] * 7, [1.0] * 7, [1e6] * 7, [0.5] * 6 + [0.5 + 9e-7]], ids=["tenths", "0", "1", "large", "near"]
)
def test_equal_rewards_are_exactly_zero(array, kind, group):
    """np.std of seven 0.1 is 1.4e-17: `std == 0` would divide rounding noise by itself."""
    np.testing.assert_array_equal(group_advantages(array([group]), kind=kind), np.zeros((1, 7)))


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_further_apart_than_epsilon_count(array, kind):
    got = np.asarray(group_advantages(array([[0.0, 0.0, 4e-6], [0.0, 0.0, 1e-6]]), kind=kind))
    assert got[0, 2] > 0 > got[0, 0]
    np.testing.assert_array_equal(got[1], 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_group_with_a_score_that_is_not_finite_is_zero_and_leaks_nowhere(array, kind, bad):
    rewards = array([[0, bad, 1, 0], [0, 0, 1, 1]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = np.asarray(group_advantages(rewards, kind=kind))
    np.testing.assert_array_equal(got[0], 0)
    np.testing.assert_array_equal(got[1:], group_advantages(rewards[1:], kind=kind))
    assert got[1, 2] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_in_dead_and_invalid_groups(kind):
    rewards = jnp.array([[0.1, 0.1, 0.1], [0.0, 0.0, 0.0], [0.0, jnp.nan, 1.0], [0.0, 0.5, 1.0]])
    grads = jax.grad(lambda r: jnp.sum(group_advantages(r, kind=kind) * jnp.array([0.0, 1.0, 4.0])))(rewards)
    assert np.isfinite(grads).all()
    np.testing.assert_array_equal(grads[:3], 0)
    assert np.abs(grads[3]).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_every_group_sums_to_zero(array, kind):
    rewards = np.random.default_rng(0).choice([0.0, 0.1, 1.0], (64, 8))
    got = np.asarray(group_advantages(array(rewards), kind=kind))
    assert np.abs(got).max() > 0.5
    np.testing.assert_allclose(got.sum(1), 0, atol=2e-6)


def test_rloo_is_the_reward_less_the_mean_of_the_others():
    rewards = np.random.default_rng(1).normal(size=(5, 6))
    others = (rewards.sum(1, keepdims=True) - rewards) / 5
    np.testing.assert_allclose(group_advantages(rewards, kind="rloo"), rewards - others, atol=1e-6)


def test_bad_input_is_refused(array):
    for kind in KINDS:
        with pytest.raises(UserError, match=r"at least 2, got \(3, 1\)"):
            group_advantages(array(np.zeros((3, 1))), kind=kind)
        with pytest.raises(ValueError, match=r"\[P, G\], got \(4,\)"):
            group_advantages(array(np.zeros(4)), kind=kind)
    with pytest.raises(UserError, match=r"got 'loo' \(did you mean rloo\?\)"):
        group_advantages(array(np.zeros((2, 2))), kind="loo")
    with pytest.raises(UserError, match=r"did you mean dr_grpo\?"):
        group_advantages(array(np.zeros((2, 2))), kind="drgrpo")
