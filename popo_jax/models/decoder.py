"""The decoder: one Linen block, and plain functions that scan it in training and unroll it over a cache in decoding.

Parameters are one nested dict, blocks stacked on axis 0:
    embed/embedding   layers/{attn_norm, attn/{q,k,v,o,q_norm,k_norm}, mlp_norm, mlp/{gate,up,down}}   norm/scale   head/kernel
and those of a vision tower, if the policy has one, under vision/ (vision.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from popo_jax.model_config import ModelConfig
from popo_jax.models import lora, vision
from popo_jax.models.attention import Attend, Attention, attention
from popo_jax.models.flash import causal, resolve_attention
from popo_jax.models.kv_cache import Cache, allocate, visible, write
from popo_jax.models.linear import Linear, precision, resolve_linear
from popo_jax.models.mlp import Mlp
from popo_jax.models.norm import RMSNorm
from popo_jax.models.placed import brought, by_rows
from popo_jax.models.rope import Rope, multimodal_rope, rope
from popo_jax.ops.hidden_logprobs import auto_chunk, hidden_logprobs
from popo_jax.ops.logprobs import logprobs_and_entropy
from popo_jax.scenes import Images

Params = dict[str, Any]
DecodeParams = dict[str, Any]
"""embed, norm and head as in Params; layers: a list with one block's weights each, q/k/v and gate/up fused."""


UNROLL = 8
"""Blocks per iteration of training's scan. Saved activations of a scan are copied into one array: one block at a time costs 1.2
times on CPU, and a model of up to so many blocks copies none."""


def resolved(c: ModelConfig, platform: str) -> ModelConfig:
    """`c` with what is `auto` decided for a platform ("cpu", "gpu", "tpu"). Errors: UserError if a choice cannot work there."""
    return resolve_attention(resolve_linear(c, platform), platform)


class Block(nn.Module):
    """Attention and MLP, each on the norm of the residual stream. Returns the stream and what `attend` keeps."""

    c: ModelConfig
    fused: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], angles: Rope, attend: Attend) -> tuple[Float[Array, "B T D"], Any]:
        y, kept = Attention(self.c, self.fused, name="attn")(RMSNorm(self.c, name="attn_norm")(x), angles, attend)
        x = x + y
        return x + Mlp(self.c, self.fused, name="mlp")(RMSNorm(self.c, name="mlp_norm")(x)), kept


class Embed(nn.Module):
    """Rows of the embedding table, in the computation's dtype."""

    c: ModelConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        assert self.c.vocab_size is not None
        table = self.param("embedding", nn.initializers.normal(0.02), (self.c.vocab_size, self.c.width), self.c.param_dtype)
        return table.astype(self.c.dtype)[tokens]


@dataclass(frozen=True)
class Decoder:
    """A policy of shape `c`, with vocab_size set, `linear` and `attention` resolved. Hashable: static under jit."""

    c: ModelConfig
    row_shards: int = field(default=1, kw_only=True)
    """Devices that the rows of a batch are split over."""
    mesh: Mesh | None = field(default=None, kw_only=True)
    """Where training runs, for kernels that the compiler does not split; None: one device."""

    def __post_init__(self) -> None:
        c = self.c
        if c.vocab_size is None or "auto" in (c.linear, c.attention):
            got = f"{c.vocab_size}, {c.linear!r} and {c.attention!r}"
            raise ValueError(f"Decoder: set vocab_size, resolve linear and attention first, got {got}")

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters in `param_dtype`: normal(0.02), biases 0, scales 1."""
        c, x = self.c, jnp.zeros((1, 1, self.c.width), self.c.dtype)
        embed, blocks, head = jax.random.split(key, 3)
        angles, attend = rope(jnp.zeros((1, 1), jnp.int32), c), _causal(replace(c, attention="xla"), None)

        def block(key: jax.Array) -> Params:
            return Block(c).init(key, x, angles, attend)["params"]

        params = {
            "embed": Embed(c).init(embed, jnp.zeros((1, 1), jnp.int32))["params"],
            "layers": jax.vmap(block)(jax.random.split(blocks, c.layers)),
            "norm": RMSNorm(c).init(head, x)["params"],
        }
        params |= {"vision": vision.init(jax.random.fold_in(key, 1), c)} if c.sees else {}
        return params if c.tie_embeddings else params | {"head": Linear(c, c.vocab_size).init(head, x)["params"]}  # type: ignore[arg-type]

    def logits(self, params: Params, tokens: Int[Array, "B T"], images: Images | None = None) -> Float[Array, "B T V"]:
        """Float32 logits of the next token at every position. Causal; rows start at position 0 and are padded on the right."""
        return self.head(params, self.hidden(params, tokens, images))

    def logprobs(
        self, params: Params, tokens: Int[Array, "B T"], *, temperature: float, images: Images | None = None
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """(log-prob of token t, entropy of the distribution it was drawn from), nats, float32; both 0 at t = 0.

        All logits at once where they are few, else a chunk of positions at a time (`model.head_chunk`).
        """
        hidden, shards = self.hidden(params, tokens, images), math.gcd(self.row_shards, tokens.shape[0])
        assert self.c.vocab_size is not None
        chunk = self.c.head_chunk or auto_chunk(tokens.shape[0] // shards, tokens.shape[1], self.c.vocab_size)
        name = "embed" if self.c.tie_embeddings else "head"
        head = brought({name: params[name]}, self.c.dtype, self.mesh)  # once, before the loop over chunks
        if chunk is None:
            return logprobs_and_entropy(self.head(head, hidden), tokens, temperature=temperature)
        weight, axis = (head["embed"]["embedding"], 0) if self.c.tie_embeddings else (head["head"]["kernel"], 1)
        how = {"temperature": temperature, "chunk": chunk, "vocab_axis": axis, "row_shards": shards}
        return hidden_logprobs(hidden, weight, tokens, **how)  # type: ignore[arg-type]

    def hidden(self, params: Params, tokens: Int[Array, "B T"], images: Images | None = None) -> Float[Array, "B T D"]:
        """The last block's output, final norm applied: what `head` reads. images: what the rows see; None: text alone."""
        angles, attend = self._angles(jnp.arange(tokens.shape[1]), images), _causal(self.c, self.mesh)

        def block(x: Array, weights: Params) -> tuple[Array, None]:
            weights = brought(weights, self.c.dtype, self.mesh, below="layers")
            return by_rows(_apply(Block(self.c), weights, x, angles, attend)[0], self.mesh), None

        embed = brought({"embed": params["embed"]}, self.c.dtype, self.mesh)["embed"]
        x = by_rows(self._embedded(embed, params, tokens, images, local=False), self.mesh)
        unroll = min(UNROLL, self.c.layers) if self.c.remat == "none" else 1
        x, _ = jax.lax.scan(_remat(block, self.c.remat), x, params["layers"], unroll=unroll)
        return by_rows(self._norm(params, x), self.mesh)

    def head(self, params: Params | DecodeParams, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits of hidden states, summed in float32 whatever the computation's dtype."""
        w = params["embed"]["embedding"].T if self.c.tie_embeddings else params["head"]["kernel"]
        return jnp.dot(hidden, w.astype(hidden.dtype), precision=precision(hidden), preferred_element_type=jnp.float32)

    def for_decode(self, params: Params) -> DecodeParams:
        """The weights as `prefill` and `decode` read them, adapters merged; make them once per sampling call."""
        cast = jax.tree.map(lambda w: w.astype(self.c.dtype), lora.merge(params, self.c))
        blocks = [jax.tree.map(lambda w, i=i: w[i], cast["layers"]) for i in range(self.c.layers)]
        return cast | {"layers": [fuse(block) for block in blocks]}

    def prefill(
        self,
        decode_params: DecodeParams,
        tokens: Int[Array, "B S"],
        start: Int[Array, " B"],
        capacity: int,
        images: Images | None = None,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits of the last slot, and a cache of `capacity` slots. Row b occupies slots start[b] .. S - 1.

        images: what the rows see; `position` [B, S, 3] by slots.
        """
        S = tokens.shape[1]
        slots = jnp.arange(S)
        mask_BTS = visible(start, slots, S, self.c.window)

        def attend(i: int, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            return attention(q, k, v, mask_BTS), allocate(k, v, capacity)

        angles = self._angles(slots - start[:, None], images)
        return self._unrolled(
            decode_params, self._embedded(decode_params["embed"], decode_params, tokens, images), angles, attend
        )

    def decode(
        self,
        decode_params: DecodeParams,
        cache: Cache,
        token: Int[Array, " B"],
        slot: Int[Array, ""],
        start: Int[Array, " B"],
        shift: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits after one more token per row, all rows at the same slot; row b's position is slot - start[b] + shift[b]."""
        mask_BTS = visible(start, slot[None], cache[0][1].shape[2], self.c.window)

        def attend(i: int, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            layer = write(cache[i], k, v, slot)
            return attention(q, *layer, mask_BTS, keys="BKHS"), layer

        position = slot - start if shift is None else slot - start + shift
        x = _apply(Embed(self.c), decode_params["embed"], token[:, None])
        return self._unrolled(decode_params, x, rope(position[:, None], self.c), attend)

    def _unrolled(
        self, weights: DecodeParams, x: Array, angles: Rope, attend: Callable[..., tuple[Array, Any]]
    ) -> tuple[Array, Cache]:
        cache: list[Any] = []
        angles = jax.lax.optimization_barrier(angles)  # or XLA computes them again for every head and layer
        for i, block in enumerate(weights["layers"]):
            x, layer = _apply(Block(lora.without(self.c), fused=True), block, x, angles, partial(attend, i))
            cache.append(layer)
        return self.head(weights, self._norm(weights, x[:, -1])), tuple(cache)

    def _angles(self, position: Array, images: Images | None) -> Rope:
        return rope(position, self.c) if images is None else multimodal_rope(images.position, self.c)

    def _embedded(self, embed: Params, params: Params, tokens: Array, images: Images | None, *, local: bool = True) -> Array:
        """Embeddings [B, T, D], features in place of image tokens. local: in a program of one shard of the rows."""
        x = _apply(Embed(self.c), embed, tokens)
        if images is None:
            return x
        assert self.c.vision.image_token is not None
        wrap = partial(_remat, remat=self.c.remat)
        found = vision.features(params["vision"], images, self.c, self.mesh, wrap=wrap, local=local)
        return vision.spliced(x, tokens, found, images.order, self.c.vision.image_token)

    def _norm(self, params: Params | DecodeParams, x: Array) -> Array:
        return _apply(RMSNorm(self.c), params["norm"], x)


def _apply(module: nn.Module, weights: Params, *args: Any) -> Any:
    return module.apply({"params": weights}, *args)


def fuse(block: Params) -> Params:
    """One block's weights with q/k/v and gate/up side by side: two products instead of five."""

    def beside(*parts: Params) -> Params:
        return jax.tree.map(lambda *w: jnp.concatenate(w, axis=-1), *parts)

    attn, mlp = block["attn"], block["mlp"]
    return block | {
        "attn": {k: v for k, v in attn.items() if k not in ("q", "k", "v")} | {"qkv": beside(attn["q"], attn["k"], attn["v"])},
        "mlp": {"gate_up": beside(mlp["gate"], mlp["up"]), "down": mlp["down"]},
    }


def _causal(c: ModelConfig, mesh: Mesh | None) -> Attend:
    kernel = causal(c, mesh)
    return lambda q, k, v: (kernel(q, k, v), None)


def _remat(block: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """`dots` keeps the products with weights; attention's scores, quadratic in T, are computed again.

    The scan itself separates forward from backward, so nothing need be done against common subexpressions; that is why
    a rematerialized scan is not unrolled.
    """
    if remat == "none":
        return block
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(block, policy=policy, prevent_cse=False)
