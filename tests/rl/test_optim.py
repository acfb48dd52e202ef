"""AdamW in float32 around weights and moments kept in bfloat16: what rounding to the nearest would lose must arrive."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from popo_jax.rl.optim import apply, make_tx
from tests import tiny

SHAPE = (64, 64)


def walk(dtype, state_dtype, *, steps: int, rate: float, grad, weight_decay: float = 0.0):
    """Parameters and state after `steps` on gradients grad(i), from weights of 0.02."""
    tx = make_tx(tiny.config(optim__state_dtype=state_dtype, optim__weight_decay=weight_decay, optim__grad_clip=1e9).optim)
    params = {"x": {"kernel": jnp.full(SHAPE, 0.02, dtype)}}
    state = tx.init(params)

    def step(carry, i):
        params, state = carry
        new, state, _ = apply(tx, {"x": {"kernel": grad(i).astype(dtype)}}, state, params, jnp.float32(rate), jax.random.key(i))
        return (new, state), None

    (params, state), _ = jax.lax.scan(step, (params, state), jnp.arange(steps))
    return np.asarray(params["x"]["kernel"], np.float32), state


def test_small_steps_on_bfloat16_weights_arrive_on_average():
    """100 steps of 1e-6 on 0.02, whose bfloat16 neighbours are 1.2e-4 away: rounded to the nearest nothing would ever move."""
    got, _ = walk(jnp.bfloat16, "float32", steps=100, rate=1e-6, grad=lambda i: jnp.ones(SHAPE))
    start = float(jnp.bfloat16(0.02))
    assert start - got.mean() == pytest.approx(1e-4, rel=0.15) and len(np.unique(got)) > 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_moments_in_bfloat16_follow_those_in_float32(dtype):
    """Gradients fall to a tenth: with b2 = 0.999 the second moment must come down, a thousandth of itself at a time."""
    grad = lambda i: jnp.where(i < 200, 1.0, 0.1) * jnp.ones(SHAPE)  # noqa: E731
    kw = {"steps": 1000, "rate": 0.0, "grad": grad}
    (_, wide), (_, narrow) = walk(dtype, "float32", **kw), walk(dtype, "bfloat16", **kw)
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(narrow), strict=True):
        if a.ndim:
            assert (a.dtype, b.dtype) == (jnp.float32, jnp.bfloat16)
            assert float(jnp.mean(b.astype(jnp.float32))) == pytest.approx(float(jnp.mean(a)), rel=0.02)


def test_in_float32_it_is_optax_adamw():
    """Two steps, with decay on the kernel, none on the bias, and the global norm clipped."""
    c = tiny.config(optim__weight_decay=0.1, optim__grad_clip=0.5, optim__b2=0.95).optim
    params = {"d": {"kernel": jax.random.normal(jax.random.key(0), (4, 3)), "bias": jnp.ones(3)}}
    grads = [jax.tree.map(lambda x, i=i: jnp.sin(x + i), params) for i in range(2)]
    mask = {"d": {"kernel": True, "bias": False}}
    adamw = optax.adamw(0.01, b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=0.1, mask=mask)
    reference, tx = optax.chain(optax.clip_by_global_norm(0.5), adamw), make_tx(c)
    ours, theirs, state, theirs_state = params, params, tx.init(params), reference.init(params)
    for g in grads:
        ours, state, moves = apply(tx, g, state, ours, jnp.float32(0.01), jax.random.key(0))
        updates, theirs_state = reference.update(g, theirs_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), moves, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)
