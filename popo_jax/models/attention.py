"""Grouped-query attention, head-major, with rotary positions.

B sequences, T queries, S keys, K key/value heads, R query heads to each of them, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from popo_jax.model_config import ModelConfig
from popo_jax.models.linear import Linear, precision
from popo_jax.models.norm import RMSNorm
from popo_jax.models.rope import Rope

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""(q_BKRTH, k_BKTH, v_BKTH) -> (out_BKRTH, what the caller keeps of this layer)."""


def attention(q_BKRTH: Array, k: Array, v_BKSH: Array, mask: Array, *, keys: Literal["BKSH", "BKHS"] = "BKSH") -> Array:
    """softmax(q k' / sqrt(H)) v, [B, K, R, T, H]; softmax in float32.

    `keys` is the layout of k. mask: bool, broadcast to [B, T, S], True = seen. A query that sees nothing gets the mean of all
    values: finite, unused.
    """
    H = q_BKRTH.shape[-1]
    q_BKRTH = q_BKRTH * jnp.asarray(H**-0.5, q_BKRTH.dtype)
    scores = jnp.einsum(f"BKRTH,{keys}->BKRTS", q_BKRTH, k, precision=precision(q_BKRTH), preferred_element_type=jnp.float32)
    mask_BKRTS = mask[..., None, None, :, :] if mask.ndim == 3 else mask
    weights = jax.nn.softmax(jnp.where(mask_BKRTS, scores, -1e30), axis=-1).astype(v_BKSH.dtype)
    return jnp.einsum("BKRTS,BKSH->BKRTH", weights, v_BKSH, precision=precision(v_BKSH))


def rotate(x_BNTH: Array, angles: Rope) -> Array:
    """Rotate each pair (i, i + H/2) of the head dim: the half-split layout of Hugging Face's checkpoints."""
    cos, sin = (a[..., None, :, :] for a in angles)
    a, b = jnp.split(x_BNTH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BNTH.dtype)


class Attention(nn.Module):
    """Projections around `attend`. fused: one weight for q, k and v together, as `Decoder.for_decode` lays them out."""

    c: ModelConfig
    fused: bool = False

    @nn.compact
    def __call__(self, x_BTD: Array, angles: Rope, attend: Attend) -> tuple[Array, Any]:
        c, (B, T, D) = self.c, x_BTD.shape
        N, K, H = c.heads, c.kv_heads, c.head_dim
        if self.fused:
            qkv = Linear(c, (N + 2 * K) * H, c.attention_bias, name="qkv")(x_BTD)
            q, k, v = jnp.split(qkv, [N * H, (N + K) * H], axis=-1)
        else:
            q, k, v = (Linear(c, n * H, c.attention_bias, name=name)(x_BTD) for name, n in (("q", N), ("k", K), ("v", K)))
        q_BNTH, k_BKTH, v_BKTH = (x.reshape(B, T, -1, H).swapaxes(1, 2) for x in (q, k, v))
        if c.qk_norm:
            q_BNTH, k_BKTH = RMSNorm(c, name="q_norm")(q_BNTH), RMSNorm(c, name="k_norm")(k_BKTH)
        q_BNTH, k_BKTH = rotate(q_BNTH, angles), rotate(k_BKTH, angles)
        out_BKRTH, kept = attend(q_BNTH.reshape(B, K, N // K, T, H), k_BKTH, v_BKTH)
        out_BTE = out_BKRTH.reshape(B, N, T, H).swapaxes(1, 2).reshape(B, T, N * H)
        return Linear(c, D, c.output_bias, name="o")(out_BTE), kept
