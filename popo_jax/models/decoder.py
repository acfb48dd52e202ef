"""The decoder: one Linen block, and plain functions that scan it in training and unroll it over a cache in decoding.

Parameters are one nested dict, blocks stacked on axis 0:
    embed/embedding   layers/{attn_norm, attn/{q,k,v,o,q_norm,k_norm}, mlp_norm, mlp/{gate,up,down}}   norm/scale   head/kernel
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
from popo_jax.models import lora
from popo_jax.models.attention import Attend, Attention, attention
from popo_jax.models.flash import causal, resolve_attention
from popo_jax.models.kv_cache import Cache, allocate, visible, write
from popo_jax.models.linear import Linear, precision, resolve_linear
from popo_jax.models.norm import RMSNorm
from popo_jax.models.placed import brought, by_rows
from popo_jax.models.rope import Rope, rope
from popo_jax.ops.hidden_logprobs import auto_chunk, hidden_logprobs
from popo_jax.ops.logprobs import logprobs_and_entropy

Params = dict[str, Any]
DecodeParams = dict[str, Any]
"""embed, norm and head as in Params; layers: a list with one block's weights each, q/k/v and gate/up fused."""


UNROLL = 8
"""Blocks per iteration of training's scan. Saved activations of a scan are copied into one array: one block at a time costs 1.2
times on CPU, and a model of up to so many blocks copies none."""


def resolved(c: ModelConfig, platform: str) -> ModelConfig:
    """`c` with what is `auto` decided for a platform ("cpu", "gpu", "tpu"). Errors: UserError if a choice cannot work there."""
    return resolve_attention(resolve_linear(c, platform), platform)


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
        return params if c.tie_embeddings else params | {"head": Linear(c, c.vocab_size).init(head, x)["params"]}  # type: ignore[arg-type]

    def logits(self, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Float32 logits of the next token at every position. Causal; rows start at position 0 and are padded on the right."""
        return self.head(params, self.hidden(params, tokens))

    def logprobs(
        self, params: Params, tokens: Int[Array, "B T"], *, temperature: float
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """(log-prob of token t, entropy of the distribution it was drawn from), nats, float32; both 0 at t = 0.

        All logits at once where they are few, else a chunk of positions at a time (`model.head_chunk`).
        """
        hidden, shards = self.hidden(params, tokens), math.gcd(self.row_shards, tokens.shape[0])
        assert self.c.vocab_size is not None
        chunk = self.c.head_chunk or auto_chunk(tokens.shape[0] // shards, tokens.shape[1], self.c.vocab_size)
        name = "embed" if self.c.tie_embeddings else "head"
        head = brought({name: params[name]}, self.c.dtype, self.mesh)  # once, before the loop over chunks
        if chunk is None:
            return logprobs_and_entropy(self.head(head, hidden), tokens, temperature=temperature)
        weight, axis = (head["embed"]["embedding"], 0) if self.c.tie_embeddings else (head["head"]["kernel"], 1)
        how = {"temperature": temperature, "chunk": chunk, "vocab_axis": axis, "row_shards": shards}
        return hidden_logprobs(hidden, weight, tokens, **how)  # type: ignore[arg-type]

    def hidden(self, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The last block's output, final norm applied: what `head` reads."""
        angles, attend = rope(jnp.arange(tokens.shape[1]), self.c), _causal(self.c, self.mesh)

        def block(x: Array, weights: Params) -> tuple[Array, None]:
            weights = brought(weights, self.c.dtype, self.mesh, below="layers")
            return by_rows(_apply(Block(self.c), weights, x, angles, attend)[0], self.mesh), None

        embed = brought({"embed": params["embed"]}, self.c.dtype, self.mesh)["embed"]
        x = by_rows(_apply(Embed(self.c), embed, tokens), self.mesh)
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
        self, decode_params: DecodeParams, tokens: Int[Array, "B S"], start: Int[Array, " B"], capacity: int
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits of the last slot, and a cache of `capacity` slots. Row b occupies slots start[b] .. S - 1."""
        S = tokens.shape[1]
        slots = jnp.arange(S)
        mask_BTS = visible(start, slots, S, self.c.window)

        def attend(i: int, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            return attention(q, k, v, mask_BTS), allocate(k, v, capacity)

        return self._unrolled(decode_params, tokens, slots - start[:, None], attend)

    def decode(
        self, decode_params: DecodeParams, cache: Cache, token: Int[Array, " B"], slot: Int[Array, ""], start: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits after one more token per row, all rows at the same slot; row b's position is slot - start[b]."""
        mask_BTS = visible(start, slot[None], cache[0][1].shape[2], self.c.window)

        def attend(i: int, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            layer = write(cache[i], k, v, slot)
            return attention(q, *layer, mask_BTS, keys="BKHS"), layer

        return self._unrolled(decode_params, token[:, None], (slot - start)[:, None], attend)

    def _unrolled(
        self, weights: DecodeParams, tokens: Array, position: Array, attend: Callable[..., tuple[Array, Any]]
    ) -> tuple[Array, Cache]:
        x, cache = _apply(Embed(self.c), weights["embed"], tokens), []
        angles = jax.lax.optimization_barrier(rope(position, self.c))  # or XLA computes them again for every head and layer
        for i, block in enumerate(weights["layers"]):
            x, layer = _apply(Block(lora.without(self.c), fused=True), block, x, angles, partial(attend, i))
            cache.append(layer)
        return self.head(weights, self._norm(weights, x[:, -1])), tuple(cache)

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
