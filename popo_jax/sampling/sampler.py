"""Prefill and decode over a KV cache, jitted: prompts in, tokens, log-probs and mask out together.

Each prompt is prefilled once and shared by its G samples. Rows decode in lock-step, a chunk of tokens per program; between
chunks finished rows are dropped and the rest moved to the next smaller bucket. `max_rows` cuts the rows into waves of
whole groups. None of it changes a draw: keys belong to (row, token).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from popo_jax.models.decoder import Decoder
from popo_jax.sampling.draw import draw
from popo_jax.types import Responses

SMALLEST_BUCKET = 8


class SampleFn(Protocol):
    """The seam for other engines: prompts [P] of token arrays -> Responses of P * samples rows."""

    def __call__(self, params: Any, prompts: Sequence[np.ndarray], key: jax.Array, *, version: int) -> Responses: ...


@dataclass(frozen=True)
class Decoding:
    """Static settings of a sampler; part of the compiled programs' identity."""

    samples: int
    temperature: float
    top_k: int | None
    top_p: float
    max_prompt: int
    max_response: int
    chunk: int
    max_rows: int | None
    eos_ids: tuple[int, ...]


class Rows(NamedTuple):
    """b rows in flight. Row indices are global; -1 marks a row that only fills the shape."""

    cache: Any
    token: Int[Array, " b"]
    row: Int[Array, " b"]
    start: Int[Array, " b"]
    done: Bool[Array, " b"]


class Drawn(NamedTuple):
    tokens: Int[Array, "b C"]
    mask: Bool[Array, "b C"]
    logp: Float[Array, "b C"]


@dataclass(frozen=True)
class Sampler:
    """Callable (params, prompts, key, *, version) -> Responses. Errors: ValueError for a prompt over the limit."""

    model: Decoder
    c: Decoding

    def __call__(self, params: Any, prompts: Sequence[np.ndarray], key: jax.Array, *, version: int) -> Responses:
        longest = max(len(p) for p in prompts)
        if longest > self.c.max_prompt:
            raise ValueError(f"a prompt has {longest} tokens, the sampler's limit is {self.c.max_prompt}")
        B, R = len(prompts) * self.c.samples, self.c.max_response
        out = Responses(
            np.zeros((B, R), np.int32), np.zeros((B, R), bool), np.zeros((B, R), np.float32), np.zeros(B, bool), version
        )
        weights = _for_decode(params, model=self.model)
        per_wave = len(prompts) if self.c.max_rows is None else min(len(prompts), max(self.c.max_rows // self.c.samples, 1))
        for first in range(0, len(prompts), per_wave):
            self._wave(weights, prompts[first : first + per_wave], key, first, per_wave, out)
        return replace(out, ended=_ended(out, self.c.eos_ids))

    def _wave(self, weights: Any, prompts: Sequence[np.ndarray], key: jax.Array, first: int, size: int, out: Responses) -> None:
        tokens, start = right_align(prompts, size, self.c.max_prompt)
        row = np.arange(size * self.c.samples, dtype=np.int32) + first * self.c.samples
        row[len(prompts) * self.c.samples :] = -1
        rows, drawn = _prefill(weights, tokens, start, row, key, model=self.model, c=self.c)
        _record(out, drawn, row, 0)
        for t in range(1, self.c.max_response, self.c.chunk):
            active = ~np.asarray(rows.done)
            if not active.any():
                break
            bucket = smaller_bucket(size * self.c.samples, int(active.sum()))
            if bucket < len(active):
                kept = np.argsort(~active, kind="stable")[:bucket]
                rows, row = _take(rows, kept), row[kept]
            rows, drawn = _decode(weights, rows, np.int32(tokens.shape[1]), np.int32(t), key, model=self.model, c=self.c)
            _record(out, drawn, row, t)


def right_align(prompts: Sequence[np.ndarray], size: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [size, S], start [size]): prompts end at the last slot, S the longest's bucket; extra rows repeat the first."""
    S = min(limit, max(16, 1 << (max(len(p) for p in prompts) - 1).bit_length()))
    tokens, start = np.zeros((size, S), np.int32), np.zeros(size, np.int32)
    for i in range(size):
        p = prompts[i] if i < len(prompts) else prompts[0]
        tokens[i, S - len(p) :], start[i] = p, S - len(p)
    return tokens, start


def smaller_bucket(rows: int, active: int) -> int:
    """The least bucket of a wave of `rows` that holds the active ones: rows, 3/4 rows, 1/2, 3/8, 1/4, ...

    Only whole numbers, none under SMALLEST_BUCKET. Each is a compiled program; with lengths spread evenly the steps of three
    quarters save a tenth of the decoded rows.
    """
    best = rows
    while rows >= max(active, SMALLEST_BUCKET):
        best = rows
        if rows % 4 == 0 and rows // 4 * 3 >= max(active, SMALLEST_BUCKET):
            best = rows // 4 * 3
        if rows % 2:
            break
        rows //= 2
    return best


def _record(out: Responses, drawn: Drawn, row: np.ndarray, t: int) -> None:
    """Write a chunk drawn from position t on into the host's arrays."""
    real = row >= 0
    width = min(drawn.tokens.shape[1], out.tokens.shape[1] - t)
    mask = np.asarray(drawn.mask)[real, :width]
    span = slice(t, t + width)
    out.tokens[row[real], span] = np.where(mask, np.asarray(drawn.tokens)[real, :width], 0)
    out.logp[row[real], span] = np.where(mask, np.asarray(drawn.logp)[real, :width], 0)
    out.sampled_mask[row[real], span] = mask


def _ended(out: Responses, eos_ids: tuple[int, ...]) -> np.ndarray:
    return np.asarray((out.sampled_mask & np.isin(out.tokens, eos_ids)).any(axis=1))


@functools.partial(jax.jit, static_argnames="model")
def _for_decode(params: Any, *, model: Decoder) -> Any:
    return model.for_decode(params)


@functools.partial(jax.jit, static_argnames=("model", "c"))
def _prefill(
    weights: Any, tokens: Array, start: Array, row: Array, key: jax.Array, *, model: Decoder, c: Decoding
) -> tuple[Rows, Drawn]:
    """Caches of W prompts, repeated for their samples, and every row's first token."""
    logits_WV, cache = model.prefill(weights, tokens, start, tokens.shape[1] + c.max_response)
    cache, logits_BV, start = jax.tree.map(lambda x: jnp.repeat(x, c.samples, axis=0), (cache, logits_WV, start))
    token, logp = _draw(logits_BV, key, row, jnp.int32(0), c)
    real = row >= 0
    return Rows(cache, token, row, start, ~real | _is_end(token, c)), Drawn(token[:, None], real[:, None], logp[:, None])


@functools.partial(jax.jit, static_argnames=("model", "c"), donate_argnames="rows")
def _decode(weights: Any, rows: Rows, S: Array, t: Array, key: jax.Array, *, model: Decoder, c: Decoding) -> tuple[Rows, Drawn]:
    """Tokens t .. t + chunk - 1 of every row; stops early at the response limit or when all rows are done."""
    b = rows.token.shape[0]
    drawn = Drawn(jnp.zeros((b, c.chunk), jnp.int32), jnp.zeros((b, c.chunk), bool), jnp.zeros((b, c.chunk), jnp.float32))

    def more(carry: tuple[Array, Rows, Drawn]) -> Array:
        i, rows, _ = carry
        return (i < c.chunk) & (t + i < c.max_response) & ~jnp.all(rows.done)

    def one(carry: tuple[Array, Rows, Drawn]) -> tuple[Array, Rows, Drawn]:
        i, rows, drawn = carry
        logits_BV, cache = model.decode(weights, rows.cache, rows.token, S + t + i - 1, rows.start)
        token, logp = _draw(logits_BV, key, rows.row, t + i, c)
        drawn = Drawn(*(x.at[:, i].set(new) for x, new in zip(drawn, (token, ~rows.done, logp), strict=True)))
        return i + 1, Rows(cache, token, rows.row, rows.start, rows.done | _is_end(token, c)), drawn

    _, rows, drawn = jax.lax.while_loop(more, one, (jnp.int32(0), rows, drawn))
    return rows, drawn


@jax.jit
def _take(rows: Rows, kept: Array) -> Rows:
    return jax.tree.map(lambda x: x[kept], rows)


def _draw(logits: Array, key: jax.Array, row: Array, t: Array, c: Decoding) -> tuple[Array, Array]:
    return draw(logits, key, row, t, temperature=c.temperature, top_k=c.top_k, top_p=c.top_p)


def _is_end(token: Array, c: Decoding) -> Array:
    return jnp.isin(token, jnp.array(c.eos_ids, jnp.int32)) if c.eos_ids else jnp.zeros(token.shape, bool)
