from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popo_jax.ops.rounding import round_tree, stochastic_round

KEYS = jax.random.split(jax.random.key(0), 4000)


@pytest.mark.parametrize("x", [1.0 + 2**-9, 1.0 + 2**-12, -3.14159, 1e-30, 2.5e20, 0.02 + 1e-6])
def test_the_mean_is_the_number_and_only_neighbours_come_out(x):
    got = np.asarray(jax.vmap(lambda k: stochastic_round(jnp.float32(x), jnp.bfloat16, k))(KEYS), np.float64)
    bits = np.array(np.float32(x)).view(np.uint32) & np.uint32(0xFFFF0000)
    low, high = (np.array(b, np.uint32).view(np.float32).astype(float) for b in (bits, bits + np.uint32(0x10000)))
    assert set(np.unique(got)) <= {float(low), float(high)}
    spread = abs(high - low)
    assert abs(got.mean() - np.float32(x)) < 4 * spread / 2 / np.sqrt(len(KEYS))


def test_exact_numbers_and_what_is_no_number_stay():
    x = jnp.array([0.0, -0.0, 1.0, -1.5, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    for key in KEYS[:20]:
        np.testing.assert_array_equal(np.asarray(stochastic_round(x, jnp.bfloat16, key), np.float32), x)


def test_other_dtypes_round_to_the_nearest():
    x = jnp.array([0.1, 1 + 2**-9], jnp.float32)
    np.testing.assert_array_equal(stochastic_round(x, jnp.float32, KEYS[0]), x)
    np.testing.assert_array_equal(stochastic_round(x, jnp.float16, KEYS[0]), x.astype(jnp.float16))


def test_leaves_of_a_tree_are_rounded_each_by_itself():
    x = jnp.full(1000, 1 + 2**-9, jnp.float32)
    tree = {"a": x, "b": x, "n": jnp.int32(3), "w": x}
    like = {"a": x.astype(jnp.bfloat16), "b": x.astype(jnp.bfloat16), "n": jnp.int32(0), "w": x}
    got = round_tree(tree, like, KEYS[0])
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in like.items()} and got["n"] == 3
    assert not np.array_equal(got["a"], got["b"]) and np.array_equal(got["w"], x)
