"""Root-mean-square norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from popo_jax.model_config import ModelConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) x scale, in float32 (arXiv:1910.07467)."""

    c: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.c.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.c.rms_eps)
        return (y * scale.astype(jnp.float32)).astype(x.dtype)
