"""Log-probs from hidden states, all logits at once and a chunk at a time: memory of a long batch, time of a short one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.suite.measure import Timed, beside_peak, compiled
from benchmarks.suite.report import Line, line
from benchmarks.suite.sizes import Head, Size
from popo_jax.models.linear import precision
from popo_jax.ops.hidden_logprobs import auto_chunk, hidden_logprobs
from popo_jax.ops.logprobs import logprobs_and_entropy


def run(size: Size) -> Iterator[Line]:
    """Log-probs, entropies and their gradient of a tied head: plain (all logits at once) and chunked, side by side."""
    if size.head is None:
        return
    h, dtype = size.head, jnp.dtype(size.train.model.dtype)
    args = shapes(h, h.timed, dtype)
    programs = {name: compiled(f, *args) for name, f in both(h, h.timed).items()}
    kept = {name: compiled(f, *shapes(h, h.kept, dtype)).temp_bytes for name, f in both(h, h.kept).items()}
    values = inputs(h, dtype)
    got = beside_peak({name: Timed(lambda p=p: p.call(*values)) for name, p in programs.items()}, size)  # type: ignore[misc]
    tokens, median = h.timed[0] * h.timed[1], {name: statistics.median(got.seconds[name]) for name in programs}
    for name, program in programs.items():
        yield line(
            f"head/{name}",
            size.name,
            got.seconds[name],
            program=program,
            flops=6 * tokens * h.width * h.vocab,  # what is computed again counts once
            tokens=tokens,
            peak=got.peak,
            others=got.others,
            vocab=h.vocab,
            width=h.width,
            chunk=chunk(h, h.timed) if name == "chunked" else None,
            of_plain=median[name] / median["plain"],
            kept_tokens=h.kept[0] * h.kept[1],
            kept_bytes=kept[name],
            kept_of_plain=(kept[name] or 0) / (kept["plain"] or 1),
        )


def both(h: Head, batch: tuple[int, int]) -> Mapping[str, Callable[..., Any]]:
    """Jitted value and gradient by the weight and the hidden states, for [rows, length] tokens."""

    def plain(hidden: Any, weight: Any, tokens: Any) -> Any:
        logits = jnp.dot(hidden, weight.T, precision=precision(hidden), preferred_element_type=jnp.float32)
        return logprobs_and_entropy(logits, tokens, temperature=1.0)

    def chunked(hidden: Any, weight: Any, tokens: Any) -> Any:
        return hidden_logprobs(hidden, weight, tokens, temperature=1.0, chunk=chunk(h, batch), vocab_axis=0)

    def loss(f: Callable[..., Any]) -> Callable[..., Any]:
        def of(*args: Any) -> Any:
            logp, entropy = f(*args)
            return -jnp.mean(logp) - 0.01 * jnp.mean(entropy)

        return of

    return {f.__name__: jax.jit(jax.value_and_grad(loss(f), (0, 1))) for f in (plain, chunked)}


def chunk(h: Head, batch: tuple[int, int]) -> int:
    """What training takes; a quarter of the row where it would take all logits at once."""
    return auto_chunk(*batch, h.vocab) or batch[1] // 4


def shapes(h: Head, batch: tuple[int, int], dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    floats = ((*batch, h.width), (h.vocab, h.width))
    return *(jax.ShapeDtypeStruct(s, dtype) for s in floats), jax.ShapeDtypeStruct(batch, jnp.int32)


def inputs(h: Head, dtype: Any) -> tuple[jax.Array, ...]:
    """Random hidden states, an embedding as `Decoder.init` makes it, and tokens."""
    a, b, c = jax.random.split(jax.random.key(0), 3)
    hidden, weight, _ = shapes(h, h.timed, dtype)
    embedding = 0.02 * jax.random.normal(b, weight.shape, dtype)
    return jax.random.normal(a, hidden.shape, dtype), embedding, jax.random.randint(c, h.timed, 0, h.vocab)
