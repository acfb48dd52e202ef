from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from popo_jax.models.kv_cache import allocate, visible, write


def test_a_new_cache_holds_the_prompt_first():
    k = jnp.arange(2 * 3 * 4 * 2.0).reshape(2, 3, 4, 2)
    got_k, got_v = allocate(k, -k, 7)
    assert got_k.shape == (2, 3, 2, 7) and got_v.shape == (2, 3, 7, 2)
    np.testing.assert_array_equal(got_k[..., :4], np.swapaxes(k, 2, 3))
    np.testing.assert_array_equal(got_v[:, :, :4], -k)


def test_a_write_touches_its_slot_alone():
    layer = allocate(jnp.ones((2, 3, 4, 2)), jnp.ones((2, 3, 4, 2)), 7)
    k, v = write(layer, jnp.full((2, 3, 1, 2), 5.0), jnp.full((2, 3, 1, 2), 6.0), jnp.int32(5))
    np.testing.assert_array_equal(k[0, 0, 0], [1, 1, 1, 1, 0, 5, 0])
    np.testing.assert_array_equal(v[1, 2, :, 1], [1, 1, 1, 1, 0, 6, 0])


def test_a_query_sees_from_its_rows_start_to_itself():
    mask = visible(jnp.array([0, 2]), jnp.array([1, 3]), 5, None)
    np.testing.assert_array_equal(mask[0], [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(mask[1], [[0, 0, 0, 0, 0], [0, 0, 1, 1, 0]])
