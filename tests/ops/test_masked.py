"""Reductions by hand, under empty and poisoned masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popo_jax.ops.masked import counted, masked_max, masked_mean, masked_sum, zeroed

X = jnp.array([[1.0, -4.0, 8.0], [-3.0, -5.0, 7.0], [2.0, 6.0, 9.0]])
MASK = jnp.array([[True, True, False], [True, True, False], [False, False, False]])
REDUCTIONS = (masked_sum, masked_mean, masked_max)


@pytest.mark.parametrize(
    "reduce, axis, expected",
    [
        (masked_sum, None, -11.0),
        (masked_mean, None, -2.75),
        (masked_max, None, 1.0),
        (masked_sum, 1, [-3.0, -8.0, 0.0]),
        (masked_mean, 1, [-1.5, -4.0, 0.0]),
        (masked_max, 1, [1.0, -3.0, 0.0]),
        (masked_sum, 0, [-2.0, -9.0, 0.0]),
        (masked_max, (0, 1), 1.0),
        (lambda x, mask, axis: counted(mask, axis), 1, [2.0, 2.0, 0.0]),
    ],
)
def test_by_hand(reduce, axis, expected):
    np.testing.assert_array_equal(reduce(X, MASK, axis=axis), expected)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_poison_reaches_neither_value_nor_gradient(reduce, poison):
    dirty = jnp.where(MASK, X, poison)
    for axis in (None, 1):
        value, grad = jax.value_and_grad(lambda x, axis=axis: jnp.sum(reduce(x, MASK, axis=axis)))(dirty)
        clean, clean_grad = jax.value_and_grad(lambda x, axis=axis: jnp.sum(reduce(x, MASK, axis=axis)))(X)
        assert value == clean
        np.testing.assert_array_equal(grad, clean_grad)
        assert np.isfinite(grad).all() and (np.asarray(grad)[~MASK] == 0).all()


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_nothing_counted_is_zero_with_a_zero_gradient(reduce):
    nothing = jnp.zeros_like(MASK)
    value, grad = jax.value_and_grad(lambda x: reduce(x, nothing))(X)
    assert value == 0
    np.testing.assert_array_equal(grad, np.zeros_like(X))


def test_low_precision_is_summed_in_float32():
    ones = jnp.ones((4, 1000), jnp.bfloat16)
    total = masked_sum(ones, ones > 0)
    assert total.dtype == jnp.float32 and total == 4000  # bfloat16 would stop at 256


def test_counts_do_not_round():
    assert counted(jnp.ones((1, 2**24 + 2), bool)) == 2**24 + 2


@pytest.mark.parametrize("reduce", (*REDUCTIONS, zeroed))
def test_a_mask_that_does_not_fit_is_refused(reduce):
    with pytest.raises(ValueError, match=r"mask \(3, 2\) for \(3, 3\)"):
        reduce(X, MASK[:, :2])
    with pytest.raises(ValueError, match="must be bool, got float32"):
        jax.eval_shape(lambda x, mask: reduce(x, mask), X, MASK.astype(jnp.float32))
