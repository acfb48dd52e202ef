"""The MLP of a block."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from popo_jax.model_config import ModelConfig
from popo_jax.models.linear import Linear


class Mlp(nn.Module):
    """silu(x gate) * (x up), down (SwiGLU, arXiv:2002.05202)."""

    c: ModelConfig
    fused: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.c
        if self.fused:
            gate, up = jnp.split(Linear(c, 2 * c.mlp, c.mlp_bias, name="gate_up")(x), 2, axis=-1)
        else:
            gate, up = Linear(c, c.mlp, c.mlp_bias, name="gate")(x), Linear(c, c.mlp, c.mlp_bias, name="up")(x)
        return Linear(c, c.width, c.mlp_bias, name="down")(nn.silu(gate) * up)
