"""From hidden states to log-probs of tokens, with the logits of a few positions at a time: [B, T, V] never exists.

Rows stay whole, so a batch split over devices stays split. The backward pass computes the logits again.
V vocabulary, C positions of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from popo_jax.ops.logprobs import aligned, scaled, speak

Carry = TypeVar("Carry")
LOGITS = 2**27
"""Logits that a device keeps at once: 0.5 GB in float32. With fewer, reading and writing the weight's gradient, to which
every chunk adds, takes longer than the products."""


class _How(NamedTuple):
    temperature: float
    chunk: int
    vocab_axis: int
    row_shards: int


def auto_chunk(rows: int, length: int, vocab: int) -> int | None:
    """Positions of one chunk for `rows` of a device, `length` tokens each, as even as can be; None: all logits fit at once."""
    positions, most = length - 1, max(LOGITS // (rows * vocab), 1)  # the last position speaks of nothing
    return None if positions <= most else -(-positions // -(-positions // most))


def hidden_logprobs(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "D V"] | Float[Array, "V D"],
    tokens: Int[Array, "B T"],
    *,
    temperature: float,
    chunk: int,
    vocab_axis: int = 1,
    row_shards: int = 1,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`logprobs_and_entropy` of the logits hidden weight, `chunk` positions at a time; float32, both 0 at t = 0.

    vocab_axis: 1 for a head [D, V], 0 for an embedding [V, D]. row_shards: devices that the rows are split over; each sums
    its own part of the weight's gradient, and the parts meet once, after the last chunk. Products are of hidden's dtype,
    summed in float32. With l the logits, p = softmax(l / temperature), a = dloss/dlogp, b = dloss/dH:

        dloss/dl = (a (onehot - p) - b p (log p + H)) / temperature

    Memory: two to three times [B, chunk, V], and in the backward pass twice the weight's gradient in float32.
    Errors: ValueError for shapes that do not fit, rows that row_shards does not divide, and a chunk below 1.
    """
    fits = hidden.ndim == 3 and hidden.shape[:2] == tokens.shape and weight.ndim == 2
    if not fits or weight.shape[1 - vocab_axis] != hidden.shape[2]:
        layout = ("[V, D]", "[D, V]")[vocab_axis]
        got = f"{hidden.shape}, {weight.shape} and {tokens.shape}"
        raise ValueError(f"expected hidden [B, T, D], weight {layout} and tokens [B, T], got {got}")
    if chunk < 1 or hidden.shape[0] % row_shards:
        raise ValueError(f"expected chunk >= 1 and row_shards that divide {hidden.shape[0]} rows, got {chunk} and {row_shards}")
    logp_BT, entropy_BT = _spoken(hidden, weight, tokens[:, 1:], _How(temperature, chunk, vocab_axis, row_shards))
    return aligned(logp_BT), aligned(entropy_BT)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spoken(hidden: Array, weight: Array, tokens: Array, how: _How) -> tuple[Array, Array]:
    """What every position but the last says of the token after it; `tokens` are shifted already."""
    return _forward(hidden, weight, tokens, how)[0]


def _forward(hidden: Array, weight: Array, tokens: Array, how: _How) -> tuple[tuple[Array, Array], Any]:
    w = weight.astype(hidden.dtype)

    def say(at: _Chunk, said: list[Array]) -> list[Array]:
        parts = speak(_logits(at.of(hidden), w, how), at.of(tokens), how.temperature)
        return [at.put(x, part) for x, part in zip(said, parts, strict=True)]

    empty = [jnp.zeros(tokens.shape, _sum_dtype(hidden))] * 4
    logp, entropy, top, log_sum = _over_chunks(tokens.shape[1], how.chunk, say, empty)
    return (logp, entropy), (hidden, weight, tokens, entropy, top, log_sum)


def _backward(how: _How, saved: Any, cotangents: tuple[Array, Array]) -> tuple[Array, Array, None]:
    hidden, weight, *per_token = saved
    w, to_hidden = weight.astype(hidden.dtype), ("BCV,VD->BCD", "BCV,DV->BCD")[how.vocab_axis]
    D, V = weight.shape if how.vocab_axis else weight.shape[::-1]

    def by_shard(x: Array) -> Array:
        return x.reshape(how.row_shards, -1, *x.shape[1:])

    def learn(at: _Chunk, grads: tuple[Array, Array]) -> tuple[Array, Array]:
        h_BCD, spoken = at.of(hidden), [at.of(x) for x in per_token]
        a_BC, b_BC = (jnp.where(at.new(), at.of(x), 0.0) for x in cotangents)
        g_BCV = _logits_gradient(_logits(h_BCD, w, how), how.temperature, spoken, a_BC, b_BC)
        g_BCV = jax.lax.optimization_barrier(g_BCV.astype(h_BCD.dtype))  # or XLA:CPU computes it for each of two products
        d_hidden = at.put(grads[0], at.of(grads[0]) + _product(to_hidden, g_BCV, w).astype(h_BCD.dtype))
        return d_hidden, grads[1] + _product("RBCD,RBCV->RDV", by_shard(h_BCD), by_shard(g_BCV))

    zeros = jnp.zeros_like(hidden), jnp.zeros((how.row_shards, D, V), _sum_dtype(hidden))
    d_hidden, d_weight_RDV = _over_chunks(per_token[0].shape[1], how.chunk, learn, zeros)
    d_weight = jnp.sum(d_weight_RDV, axis=0).astype(weight.dtype)
    return d_hidden, d_weight if how.vocab_axis else d_weight.T, None  # g's transpose would be copied in every chunk


_spoken.defvjp(_forward, _backward)


def _logits(h_BCD: Array, w: Array, how: _How) -> Array:
    return _product(("BCD,VD->BCV", "BCD,DV->BCV")[how.vocab_axis], h_BCD, w)


def _logits_gradient(logits_BCV: Array, temperature: float, spoken: Sequence[Array], a_BC: Array, b_BC: Array) -> Array:
    """dloss/dl by the formula above, from what the forward pass saved of each token."""
    tokens_BC, entropy_BC, top_BC, log_sum_BC = spoken
    log_p_BCV = scaled(logits_BCV, top_BC, temperature) - log_sum_BC[..., None]
    chosen_BCV = jax.lax.broadcasted_iota(tokens_BC.dtype, logits_BCV.shape, 2) == tokens_BC[..., None]
    pull_BCV = a_BC[..., None] + b_BC[..., None] * (log_p_BCV + entropy_BC[..., None])
    return (jnp.where(chosen_BCV, a_BC[..., None], 0.0) - jnp.exp(log_p_BCV) * pull_BCV) / temperature


class _Chunk(NamedTuple):
    """`size` positions from `start`; those before `fresh` were in the chunk before."""

    start: Array
    size: int
    fresh: Array

    def of(self, x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size, axis=1)

    def put(self, x: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, part, self.start, axis=1)

    def new(self) -> Bool[Array, " C"]:
        return self.start + jnp.arange(self.size) >= self.fresh


def _over_chunks(n: int, chunk: int, body: Callable[[_Chunk, Carry], Carry], carry: Carry) -> Carry:
    """body over n positions. The last chunk is as long as the others, and may begin inside the one before."""
    if n == 0:
        return carry
    size = min(chunk, n)
    return jax.lax.fori_loop(
        0, -(-n // size), lambda i, c: body(_Chunk(jnp.minimum(i * size, n - size), size, i * size), c), carry
    )


def _product(axes: str, x: Array, y: Array) -> Array:
    """einsum of equal dtypes, summed in float32; float32 means float32 on accelerators too."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(axes, x, y, precision=precision, preferred_element_type=_sum_dtype(x))


def _sum_dtype(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
