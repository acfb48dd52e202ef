"""Reductions over the counted entries of an array. What is masked is replaced before it is reduced, so NaN or inf
there reaches neither the value nor the gradient. An empty mask gives 0, and a gradient of 0.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

Axis = int | tuple[int, ...] | None


def masked_sum(x: Shaped[Array, "*S"], mask: Bool[Array, "*S"], axis: Axis = None) -> Float[Array, ...]:
    """Sum of x where mask, at least float32; 0 where nothing is counted. Errors: those of `zeroed`."""
    return jnp.sum(zeroed(x, mask), axis=axis)


def masked_mean(x: Shaped[Array, "*S"], mask: Bool[Array, "*S"], axis: Axis = None) -> Float[Array, ...]:
    """Mean of x where mask, at least float32; 0 where nothing is counted. Errors: those of `zeroed`."""
    return masked_sum(x, mask, axis) / jnp.maximum(counted(mask, axis), 1)


def masked_max(x: Shaped[Array, "*S"], mask: Bool[Array, "*S"], axis: Axis = None) -> Float[Array, ...]:
    """Largest x where mask, at least float32; 0 where nothing is counted. Errors: those of `zeroed`."""
    top = jnp.max(jnp.where(mask, zeroed(x, mask), -jnp.inf), axis=axis)
    return jnp.where(jnp.any(mask, axis=axis), top, 0.0)


def counted(mask: Bool[Array, "*S"], axis: Axis = None) -> Float[Array, ...]:
    """How many entries count, float32. Counted as integers: exact above 2^24 partial sums too."""
    return jnp.sum(mask, axis=axis, dtype=jnp.int32).astype(jnp.float32)


def zeroed(x: Shaped[Array, "*S"], mask: Bool[Array, "*S"]) -> Float[Array, "*S"]:
    """x in float32 (float64 stays), 0 where mask is False. Errors: ValueError for unlike shapes or a mask that is not bool."""
    x, mask = jnp.asarray(x), jnp.asarray(mask)
    if x.shape != mask.shape:
        raise ValueError(f"a mask must have its array's shape, got mask {mask.shape} for {x.shape}")
    if mask.dtype != jnp.bool_:
        raise ValueError(f"a mask must be bool, got {mask.dtype}")
    return jnp.where(mask, x.astype(jnp.promote_types(x.dtype, jnp.float32)), 0.0)
