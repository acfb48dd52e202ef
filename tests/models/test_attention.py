from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from popo_jax.model_config import ModelConfig
from popo_jax.models.attention import attention, rotate
from popo_jax.models.rope import rope

B, K, R, T, S, H = 2, 3, 2, 4, 5, 6


def qkv():
    shapes = [(B, K, R, T, H), (B, K, S, H), (B, K, S, H)]
    return tuple(jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))


def by_hand(q, k, v, mask_BTS):
    out = np.zeros(q.shape)
    for b, n, r, t in np.ndindex(B, K, R, T):
        seen = np.flatnonzero(mask_BTS[b, t])
        scores = np.array([np.dot(q[b, n, r, t], k[b, n, s]) for s in seen]) / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, n, r, t] = (weights / weights.sum()) @ np.asarray(v)[b, n, seen]
    return out


def test_equals_the_sum_written_out_head_by_head():
    q, k, v = qkv()
    mask = np.random.default_rng(0).random((B, T, S)) < 0.5
    mask[..., 1] = True
    np.testing.assert_allclose(attention(q, k, v, jnp.asarray(mask)), by_hand(q, k, v, mask), atol=1e-5)
    flat = mask[0]
    np.testing.assert_allclose(
        attention(q, k, v, jnp.asarray(flat)), by_hand(q, k, v, np.broadcast_to(flat, (B, T, S))), atol=1e-5
    )


def test_unseen_keys_and_values_change_nothing():
    q, k, v = qkv()
    mask = jnp.arange(S) < 3
    out = attention(q, k, v, jnp.broadcast_to(mask, (T, S)))
    poisoned = attention(q, k.at[:, :, 3:].set(1e9), v.at[:, :, 3:].set(1e9), jnp.broadcast_to(mask, (T, S)))
    np.testing.assert_array_equal(out, poisoned)


def test_a_query_that_sees_nothing_is_finite_and_so_is_its_gradient():
    q, k, v = qkv()
    nothing = jnp.zeros((T, S), bool)
    out, pull = jax.vjp(lambda *a: attention(*a, nothing), q, k, v)
    assert np.isfinite(out).all()
    assert all(np.isfinite(g).all() for g in pull(jnp.ones_like(out)))


def test_softmax_is_float32_in_bfloat16():
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv())
    jaxpr = str(jax.make_jaxpr(lambda *a: attention(*a, jnp.ones((T, S), bool)))(q, k, v))
    assert [line for line in jaxpr.splitlines() if " exp " in line and ":f32" in line]
    assert attention(q, k, v, jnp.ones((T, S), bool)).dtype == jnp.bfloat16


def test_rotation_turns_pair_i_by_position_times_its_frequency():
    c = ModelConfig(head_dim=H, rope_theta=100.0)
    x = jax.random.normal(jax.random.key(3), (B, K, T, H))
    position = jnp.array([[0, 1, 2, 3], [7, 8, 9, 10]])
    y = np.asarray(rotate(x, rope(position, c)))
    z, turned = (a[..., : H // 2] + 1j * a[..., H // 2 :] for a in (np.asarray(x), y))
    angle = np.asarray(position)[:, None, :, None] * 100.0 ** (-2 * np.arange(H // 2) / H)
    np.testing.assert_allclose(turned, z * np.exp(1j * angle), atol=1e-5)


def test_scores_depend_on_the_distance_alone():
    c = ModelConfig(head_dim=H)
    q, k = jax.random.normal(jax.random.key(4), (2, 1, 1, 1, H))

    def score(i, j):
        return float((rotate(q, rope(jnp.array([[i]]), c)) * rotate(k, rope(jnp.array([[j]]), c))).sum())

    np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-4)
    assert abs(score(9, 4) - score(9, 8)) > 1e-2
