"""Qwen2.5-VL's vision tower (arXiv:2502.13923): images as `scenes` lays them out -> features in place of their tokens.

Its blocks are the decoder's attention and MLP with other settings. B rows, N patches, F image tokens, T tokens; D and H as there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from popo_jax.model_config import ModelConfig
from popo_jax.models import lora
from popo_jax.models.attention import Attend, Attention, attention
from popo_jax.models.flash import within
from popo_jax.models.linear import Linear, precision
from popo_jax.models.mlp import Mlp
from popo_jax.models.norm import RMSNorm
from popo_jax.models.placed import brought, by_rows
from popo_jax.models.rope import Rope
from popo_jax.scenes import Images

THETA = 10000.0
"""Of the tower's rotary positions, whatever the decoder's."""
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def tower(c: ModelConfig) -> ModelConfig:
    """Settings of the tower's blocks: all of them with biases, no adapters."""
    v = c.vision
    return replace(
        lora.without(c),
        family="llama",  # whose output has a bias where the others have one
        width=v.width,
        heads=v.heads,
        kv_heads=v.heads,
        head_dim=v.width // v.heads,
        mlp=v.mlp,
        attention_bias=True,
        mlp_bias=True,
        rms_eps=1e-6,
    )


class VisionBlock(nn.Module):
    """The decoder's block, q, k and v in one weight as checkpoints have them."""

    c: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], angles: Rope, attend: Attend) -> Float[Array, "B N D"]:
        x = x + Attention(self.c, fused=True, name="attn")(RMSNorm(self.c, name="attn_norm")(x), angles, attend)[0]
        return x + Mlp(self.c, name="mlp")(RMSNorm(self.c, name="mlp_norm")(x))


class Merger(nn.Module):
    """Cells of merge^2 patches [B, N, D] -> [B, N / merge^2, D of the decoder]."""

    c: ModelConfig
    out: int

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B M E"]:
        x = RMSNorm(self.c, name="norm")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1] * self.c.vision.merge**2)
        x = Linear(self.c, x.shape[-1], True, name="first")(x)
        return Linear(self.c, self.out, True, name="second")(nn.gelu(x, approximate=False))


def init(key: jax.Array, c: ModelConfig) -> dict[str, Any]:
    """Fresh parameters: patch/weight [D, 3, temporal, patch, patch], layers, merger."""
    t, v = tower(c), c.vision
    patch, blocks, merger = jax.random.split(key, 3)
    x = jnp.zeros((1, v.merge**2, v.width), c.dtype)
    angles = rotations(jnp.zeros((1, v.merge**2, 3), jnp.int32), t)

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
        return q, None

    def block(key: jax.Array) -> Any:
        return VisionBlock(t).init(key, x, angles, attend)["params"]

    shape = (v.width, 3, v.temporal, v.patch, v.patch)
    return {
        "patch": {"weight": (0.02 * jax.random.normal(patch, shape)).astype(c.param_dtype)},
        "layers": jax.vmap(block)(jax.random.split(blocks, v.layers)),
        "merger": Merger(t, c.width).init(merger, x)["params"],
    }


def features(params: Any, images: Images, c: ModelConfig, mesh: Mesh | None, *, wrap: Wrap, local: bool) -> Float[Array, "B F D"]:
    """What stands in place of the image tokens, in their order; 0 beyond the last.

    params: those of the tower. wrap: around a block that is scanned (rematerialization). local: in a program of one shard of the
    rows, where nothing is to be split.
    """
    t, spread = tower(c), None if local else mesh
    outer = brought({"vision": {k: w for k, w in params.items() if k != "layers"}}, c.dtype, spread)["vision"]
    x = by_rows(_embedded(outer["patch"]["weight"], images.patches, c), spread)
    angles, (windowed, whole) = rotations(images.place, t), _attends(images.place, c, mesh, local)
    full = jnp.array(np.isin(np.arange(c.vision.layers), c.vision.full_layers))

    def block(x: Array, layer: tuple[Any, Array]) -> tuple[Array, None]:
        weights, sees_all = layer
        weights = brought(weights, c.dtype, spread, below="vision/layers")

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
            return jax.lax.cond(sees_all, whole, windowed, q, k, v), None

        return by_rows(VisionBlock(t).apply({"params": weights}, x, angles, attend), spread), None  # type: ignore[arg-type]

    x, _ = jax.lax.scan(wrap(block), x, (params["layers"], full))
    merged = Merger(t, c.width).apply({"params": outer["merger"]}, x)
    found = jnp.take_along_axis(merged, jnp.maximum(images.order, 0)[..., None], axis=1)  # type: ignore[arg-type]
    return jnp.where(images.order[..., None] >= 0, found, jnp.zeros((), found.dtype))


def spliced(
    x_BTD: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    found_BFD: Float[Array, "B F D"],
    order: Int[Array, "B F"],
    token: int,
) -> Float[Array, "B T D"]:
    """`x` with the features at the prompt's image tokens; one that the model chose itself keeps its embedding."""
    seen = tokens == token
    nth = jnp.cumsum(seen, axis=1) - 1
    seen &= nth < jnp.sum(order >= 0, axis=1, keepdims=True)
    at = jnp.clip(nth, 0, found_BFD.shape[1] - 1)
    return jnp.where(seen[..., None], jnp.take_along_axis(found_BFD, at[..., None], axis=1), x_BTD)


def rotations(place_BN3: Int[Array, "B N 3"], t: ModelConfig) -> Rope:
    """Half of the frequencies turn with the patch's row, half with its column; theta^(-4i/H), i < H/4."""
    frequencies = (1.0 / THETA ** (np.arange(0, t.head_dim // 2, 2) / (t.head_dim // 2))).astype(np.float32)
    angle = (place_BN3[..., 1:, None].astype(jnp.float32) * frequencies).reshape(*place_BN3.shape[:-1], -1)
    return jnp.cos(angle), jnp.sin(angle)


def _embedded(weight: Array, patches: Array, c: ModelConfig) -> Array:
    """Normalised pixels times the weight; an image is the same in all frames, so their weights are added first."""
    v = c.vision
    x = patches.reshape(*patches.shape[:-1], 3, -1).astype(jnp.float32) / 255.0
    x = (x - jnp.array(v.mean)[:, None]) / jnp.array(v.std)[:, None]
    w = jnp.sum(weight.astype(jnp.float32), axis=2).reshape(v.width, -1).T
    x = x.reshape(patches.shape).astype(c.dtype)
    return jnp.dot(x, w.astype(c.dtype), precision=precision(x))


def _attends(place: Array, c: ModelConfig, mesh: Mesh | None, local: bool) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """(attention within windows, which are rows of their own; attention within images)."""
    kernel, segments, size = within(c, mesh, local=local), place[..., 0], c.vision.window_patches
    seen = (segments >= 0).reshape(-1, 1, size)

    def windowed(q: Array, k: Array, v: Array) -> Array:
        def apart(x: Array) -> Array:  # [B, .., N, H] -> [B * windows, .., size, H]
            x = x.reshape(*x.shape[:-2], -1, size, x.shape[-1])
            return jnp.moveaxis(x, -3, 1).reshape(-1, *x.shape[1:-3], size, x.shape[-1])

        out = attention(apart(q), apart(k), apart(v), seen)
        out = jnp.moveaxis(out.reshape(q.shape[0], -1, *out.shape[1:]), 1, -3)
        return out.reshape(q.shape)

    return windowed, lambda q, k, v: kernel(q, k, v, segments)
