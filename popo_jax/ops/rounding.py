"""Rounding to bfloat16 by chance, so that sums of many small steps come out right on average."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def stochastic_round(x: Float[Array, "..."], dtype: Any, key: jax.Array) -> Float[Array, "..."]:
    """float32 `x` in `dtype`; in bfloat16 one of its two neighbours, the nearer more often: E[round(x)] = x.

    A bfloat16 has 8 bits of fraction: added to it, anything below 1/512 of its size would vanish (a learning rate of 1e-6 times
    a direction of 1, on weights of 0.02). A random number is added to the 16 bits that are cut off (Gupta et al.,
    arXiv:1502.02551).
    Infinities and NaN stay what they are; a dtype other than bfloat16 is rounded to the nearest.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        return x.astype(dtype)
    x = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def round_tree(tree: Any, like: Any, key: jax.Array) -> Any:
    """Every array of `tree` in the dtype of the one in `like` at its place, by `stochastic_round`; integers as they are."""
    leaves, structure = jax.tree.flatten(tree)
    keys = (jax.random.fold_in(key, i) for i in range(len(leaves)))
    rounded = [
        stochastic_round(x, y.dtype, k) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for x, y, k in zip(leaves, jax.tree.leaves(like), keys, strict=True)
    ]
    return jax.tree.unflatten(structure, rounded)
