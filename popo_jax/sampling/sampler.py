"""Prefill and decode over a KV cache, jitted: prompts in, tokens, log-probs and mask out together.

Each prompt is prefilled once and shared by its G samples. Rows decode in lock-step, a chunk of tokens per program; between
chunks finished rows are dropped and the rest moved to the next smaller bucket. `max_rows` cuts the rows into waves of
whole groups. Every shard of the mesh's (data, fsdp) samples rows of its own, from its own copy of the weights: no cache and
no token leaves its device, and unless the model is split too no shard waits for another within a chunk. None of it changes a
draw: keys belong to (row, token).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from popo_jax import scenes as layout
from popo_jax.models.decoder import Decoder
from popo_jax.sampling.draw import draw
from popo_jax.scenes import Images, Scene, Sizes
from popo_jax.sharding import BATCH, ROW_AXES, row_shards
from popo_jax.types import Responses

SMALLEST_BUCKET = 8
"""Rows of a shard."""
WHOLE = PartitionSpec()


class SampleFn(Protocol):
    """The seam for other engines: prompts [P] of token arrays -> Responses of P * samples rows.

    `first` is the number of the first prompt: a call for prompts 8 to 15 draws what they have in a call for 0 to 15.
    `scenes`: what each prompt shows, for a policy that sees.
    """

    def __call__(
        self,
        params: Any,
        prompts: Sequence[np.ndarray],
        key: jax.Array,
        *,
        version: int,
        first: int = 0,
        scenes: Sequence[Scene] | None = None,
    ) -> Responses: ...


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
    sizes: Sizes | None = None
    """The most that a prompt shows; None: prompts are text."""


class Rows(NamedTuple):
    """b rows in flight. Row indices are global; -1 marks a row that only fills the shape."""

    cache: Any
    token: Int[Array, " b"]
    row: Int[Array, " b"]
    start: Int[Array, " b"]
    done: Bool[Array, " b"]
    shift: Int[Array, " b"] | None = None
    """What a token's position is beyond its place in the row, after images; None: nothing."""


class Drawn(NamedTuple):
    tokens: Int[Array, "b C"]
    mask: Bool[Array, "b C"]
    logp: Float[Array, "b C"]


@dataclass(frozen=True)
class Sampler:
    """Callable (params, prompts, key, *, version, first, scenes) -> Responses. Errors: ValueError for a prompt over the limit."""

    model: Decoder
    c: Decoding
    mesh: Mesh

    def __call__(
        self,
        params: Any,
        prompts: Sequence[np.ndarray],
        key: jax.Array,
        *,
        version: int,
        first: int = 0,
        scenes: Sequence[Scene] | None = None,
    ) -> Responses:
        longest = max(len(p) for p in prompts)
        if longest > self.c.max_prompt:
            raise ValueError(f"a prompt has {longest} tokens, the sampler's limit is {self.c.max_prompt}")
        B, R = len(prompts) * self.c.samples, self.c.max_response
        out = Responses(
            np.zeros((B, R), np.int32), np.zeros((B, R), bool), np.zeros((B, R), np.float32), np.zeros(B, bool), version
        )
        weights = _for_decode(params, model=self.model, mesh=self.mesh)
        per_wave = len(prompts) if self.c.max_rows is None else min(len(prompts), max(self.c.max_rows // self.c.samples, 1))
        for at in range(0, len(prompts), per_wave):
            seen = None if scenes is None else scenes[at : at + per_wave]
            self._wave(weights, prompts[at : at + per_wave], seen, key, at, first + at, per_wave, out)
        return replace(out, ended=_ended(out, self.c.eos_ids))

    def programs(self, params: Any, prompts: int) -> Iterator[tuple[str, Any, Any]]:
        """(name, compiled program, ShapeDtypeStructs of its results) of what a call runs, for a full wave of `prompts` prompts at
        the longest: cast, prefill, decode, take (of one layer's cache). `params` are ShapeDtypeStructs with shardings."""
        shards, static = row_shards(self.mesh.shape), {"model": self.model, "mesh": self.mesh}
        parts, units = split_groups(prompts, self.c.samples, shards)
        c = replace(self.c, samples=self.c.samples // parts)
        i32, key = jnp.int32, jax.eval_shape(lambda: jax.random.key(0))

        def compiled(name: str, program: Any, *args: Any, **more: Any) -> tuple[str, Any, Any]:
            done = program.lower(*args, **more, **static).compile()
            shapes = jax.eval_shape(functools.partial(program, **more, **static), *args)
            return name, done, jax.tree.map(_laid, shapes, done.output_shardings)

        yield (cast := compiled("cast", _for_decode, params))
        tokens, start, row = (jax.ShapeDtypeStruct(s, i32) for s in ((units, c.max_prompt), (units,), (units * c.samples,)))
        images = None
        if c.sizes is not None:
            fields = layout.abstract(units, c.sizes, c.max_prompt, self.model.c.vision)
            images = Images(*(jax.ShapeDtypeStruct(*f) for f in fields))
        yield (prefill := compiled("prefill", _prefill, cast[2], tokens, start, row, key, images, c=c))
        at, rows = jax.ShapeDtypeStruct((), i32), prefill[2][0]
        yield compiled("decode", _decode, cast[2], rows, at, at, key, c=c)
        first = smaller_bucket(units * c.samples // shards, 1 + units * c.samples // shards // 2)  # three quarters, if it can be
        kept = jax.ShapeDtypeStruct((first * shards,), i32)
        yield "take", (done := _take.lower(rows.cache[0], kept, mesh=self.mesh).compile()), done.out_info

    def _wave(
        self,
        weights: Any,
        prompts: Sequence[np.ndarray],
        scenes: Sequence[Scene] | None,
        key: jax.Array,
        at: int,
        first: int,
        size: int,
        out: Responses,
    ) -> None:
        """Rows are written to `out` from prompt `at` on, and drawn as those of prompt number `first` on."""
        shards, static = row_shards(self.mesh.shape), {"model": self.model, "mesh": self.mesh}
        parts, units = split_groups(size, self.c.samples, shards)
        c = replace(self.c, samples=self.c.samples // parts)
        tokens, start = right_align([p for p in prompts for _ in range(parts)], units, self.c.max_prompt)
        row = np.arange(units * c.samples, dtype=np.int32) + at * self.c.samples
        row[len(prompts) * self.c.samples :] = -1
        drawn_as = np.where(row < 0, row, row + np.int32((first - at) * self.c.samples))
        images = None if scenes is None else self._images([s for s in scenes for _ in range(parts)], start, tokens.shape[1])
        rows, drawn = _prefill(weights, tokens, start, drawn_as, key, images, c=c, **static)
        _record(out, _to_host(drawn, self.mesh), row, 0)
        for t in range(1, c.max_response, c.chunk):
            active = ~_to_host(rows.done, self.mesh).reshape(shards, -1)
            if not active.any():
                break
            bucket = smaller_bucket(units * c.samples // shards, int(active.sum(axis=1).max()))
            if bucket < active.shape[1]:
                kept = np.argsort(~active, axis=1, kind="stable")[:, :bucket]
                row = np.take_along_axis(row.reshape(shards, -1), kept, axis=1).ravel()
                rows = _compacted(rows, kept.ravel(), self.mesh)
            rows, drawn = _decode(weights, rows, np.int32(tokens.shape[1]), np.int32(t), key, c=c, **static)
            _record(out, _to_host(drawn, self.mesh), row, t)

    def _images(self, scenes: Sequence[Scene], start: np.ndarray, S: int) -> Images:
        """Of every unit, extra ones like the first: as many windows as a bucket of them has that holds the largest."""
        assert self.c.sizes is not None
        v, most = self.model.c.vision, max(len(s.patches) for s in scenes)
        windows = self.c.sizes.windows
        while windows % 2 == 0 and windows // 2 * v.window_patches >= most and windows > 1:
            windows //= 2
        return layout.lay_out(
            [*scenes, *[scenes[0]] * (len(start) - len(scenes))], replace(self.c.sizes, windows=windows), S, v, start
        )


def _laid(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def split_groups(prompts: int, samples: int, shards: int) -> tuple[int, int]:
    """(parts, units): each prompt's samples in `parts` equal parts, `units` of them in a wave, as many on every shard.

    The least work, with a unit's prefill (a part prefills its prompt again) counted like a row.
    """
    divisors = [n for n in range(1, samples + 1) if samples % n == 0]
    units = {n: -(-prompts * n // shards) * shards for n in divisors}
    parts = min(divisors, key=lambda n: units[n] * (1 + samples // n))
    return parts, units[parts]


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


def _to_host(tree: Any, mesh: Mesh) -> Any:
    """As numpy; with several processes, all of it on each of them."""
    return jax.tree.map(np.asarray, _everywhere(mesh)(tree) if mesh.is_multi_process else tree)


@functools.cache
def _everywhere(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, WHOLE))


def _record(out: Responses, drawn: Drawn, row: np.ndarray, t: int) -> None:
    """Write a chunk drawn from position t on into the host's arrays."""
    real = row >= 0
    width = min(drawn.tokens.shape[1], out.tokens.shape[1] - t)
    mask = drawn.mask[real, :width]
    span = slice(t, t + width)
    out.tokens[row[real], span] = np.where(mask, drawn.tokens[real, :width], 0)
    out.logp[row[real], span] = np.where(mask, drawn.logp[real, :width], 0)
    out.sampled_mask[row[real], span] = mask


def _ended(out: Responses, eos_ids: tuple[int, ...]) -> np.ndarray:
    return np.asarray((out.sampled_mask & np.isin(out.tokens, eos_ids)).any(axis=1))


def _per_shard(f: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`f` on every shard of the rows by itself; what it does over the mesh's other axes is the compiler's."""
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(ROW_AXES), check_vma=False)


def _any(x: Bool[Array, " b"], mesh: Mesh) -> Bool[Array, ""]:
    """Whether any holds, on this shard; on all of them where the model itself is split: its collectives want every device to
    take the same steps."""
    found = jnp.any(x)
    return found if mesh.size == row_shards(mesh.shape) else jax.lax.pmax(found.astype(jnp.int32), ROW_AXES) > 0


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def _for_decode(params: Any, *, model: Decoder, mesh: Mesh) -> Any:
    return _per_shard(model.for_decode, mesh, WHOLE, WHOLE)(params)


@functools.partial(jax.jit, static_argnames=("model", "c", "mesh"))
def _prefill(
    weights: Any,
    tokens: Array,
    start: Array,
    row: Array,
    key: jax.Array,
    images: Images | None = None,
    *,
    model: Decoder,
    c: Decoding,
    mesh: Mesh,
) -> tuple[Rows, Drawn]:
    """Caches of W prompts, repeated for their samples, and every row's first token. Each prompt's images are read once."""

    def prefill(
        weights: Any, tokens: Array, start: Array, row: Array, key: jax.Array, images: Images | None
    ) -> tuple[Rows, Drawn]:
        S = tokens.shape[1]
        logits_WV, cache = model.prefill(weights, tokens, start, S + c.max_response, images)
        shift = None if images is None else images.position[:, -1, 0] + 1 - (S - start)
        per_prompt = (cache, logits_WV, start, shift)
        cache, logits_BV, start, shift = jax.tree.map(lambda x: jnp.repeat(x, c.samples, axis=0), per_prompt)
        token, logp = _draw(logits_BV, key, row, jnp.int32(0), c)
        real = row >= 0
        rows = Rows(cache, token, row, start, ~real | _is_end(token, c), shift)
        return rows, Drawn(token[:, None], real[:, None], logp[:, None])

    specs = (WHOLE, BATCH, BATCH, BATCH, WHOLE, BATCH)
    return _per_shard(prefill, mesh, specs, BATCH)(weights, tokens, start, row, key, images)


@functools.partial(jax.jit, static_argnames=("model", "c", "mesh"), donate_argnames="rows")
def _decode(
    weights: Any, rows: Rows, S: Array, t: Array, key: jax.Array, *, model: Decoder, c: Decoding, mesh: Mesh
) -> tuple[Rows, Drawn]:
    """Tokens t .. t + chunk - 1 of every row; stops early at the response limit or when all rows of the shard are done."""

    def decode(weights: Any, rows: Rows, S: Array, t: Array, key: jax.Array) -> tuple[Rows, Drawn]:
        shape = (rows.token.shape[0], c.chunk)
        drawn = Drawn(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32))

        def more(carry: tuple[Array, Rows, Drawn]) -> Array:
            i, rows, _ = carry
            return (i < c.chunk) & (t + i < c.max_response) & _any(~rows.done, mesh)

        def one(carry: tuple[Array, Rows, Drawn]) -> tuple[Array, Rows, Drawn]:
            i, rows, drawn = carry
            logits_BV, cache = model.decode(weights, rows.cache, rows.token, S + t + i - 1, rows.start, rows.shift)
            token, logp = _draw(logits_BV, key, rows.row, t + i, c)
            drawn = Drawn(*(x.at[:, i].set(new) for x, new in zip(drawn, (token, ~rows.done, logp), strict=True)))
            return i + 1, rows._replace(cache=cache, token=token, done=rows.done | _is_end(token, c)), drawn

        return jax.lax.while_loop(more, one, (jnp.int32(0), rows, drawn))[1:]

    return _per_shard(decode, mesh, (WHOLE, BATCH, WHOLE, WHOLE, WHOLE), BATCH)(weights, rows, S, t, key)


def _compacted(rows: Rows, kept: np.ndarray, mesh: Mesh) -> Rows:
    """The rows of every shard at its part of `kept`. `rows` is used up: a layer's old cache is gone before the next layer's new
    one is made, so that no more than one cache and a layer of another are held."""

    def taken(tree: Any) -> Any:
        new = _take(tree, kept, mesh=mesh)
        jax.tree.map(lambda x: x.delete(), tree)
        return new

    return taken(rows._replace(cache=()))._replace(cache=tuple(map(taken, rows.cache)))  # type: ignore[no-any-return]


@functools.partial(jax.jit, static_argnames="mesh")
def _take(tree: Any, kept: Array, *, mesh: Mesh) -> Any:
    """Rows of every shard, at positions within the shard."""
    return _per_shard(lambda tree, kept: jax.tree.map(lambda x: x[kept], tree), mesh, BATCH, BATCH)(tree, kept)


def _draw(logits: Array, key: jax.Array, row: Array, t: Array, c: Decoding) -> tuple[Array, Array]:
    return draw(logits, key, row, t, temperature=c.temperature, top_k=c.top_k, top_p=c.top_p)


def _is_end(token: Array, c: Decoding) -> Array:
    return jnp.isin(token, jnp.array(c.eos_ids, jnp.int32)) if c.eos_ids else jnp.zeros(token.shape, bool)
