"""The sampler: prefill and decode apart, whole calls with all rows to the limit, and with lengths that differ."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.suite.forced import Forced, equal, uniform
from benchmarks.suite.measure import Timed, beside_peak, compiled
from benchmarks.suite.report import Line, line
from benchmarks.suite.sizes import Size, built, prompts
from popo_jax.build import Built
from popo_jax.costs import arithmetic
from popo_jax.sampling import sampler as sampling
from popo_jax.sampling.sampler import Decoding, Sampler

KEY = 5


def run(size: Size) -> Iterator[Line]:
    """Prefill; decode; whole calls: all rows to the limit, equal lengths, lengths uniform on 1 to 10 times the shortest."""
    b = built(size.sample, jax.device_count())
    params = b.fresh_params(jax.random.key(0))
    yield from phases(size, b, params)
    yield from calls(size, b, params)


def phases(size: Size, b: Built, params: Any) -> Iterator[Line]:
    """The two compiled programs of a wave, no row ending before the limit."""
    c, key = endless(b), jax.random.key(KEY)
    shape, P, n, R = b.model.c, b.c.batch.prompts, c.max_prompt, c.max_response
    static: Any = {"model": b.model, "mesh": b.mesh}
    weights = sampling._for_decode(params, **static)
    tokens, start = sampling.right_align(prompts(b.c, shape.vocab_size), P, n)
    args = (weights, tokens, start, np.arange(P * c.samples, dtype=np.int32), key)
    prefill = compiled(sampling._prefill, *args, c=c, **static)
    S = np.int32(tokens.shape[1])
    rows = jax.eval_shape(lambda *a: sampling._prefill(*a, c=c, **static), *args)[0]
    decode = compiled(sampling._decode, weights, rows, S, np.int32(1), key, c=c, **static)

    def all_chunks(rows: Any) -> object:
        for t in range(1, R, c.chunk):
            rows, drawn = decode.call(weights, rows, S, np.int32(t), key)
        return drawn

    parts = {"prefill": Timed(lambda: prefill.call(*args)), "decode": Timed(all_chunks, lambda: (prefill.call(*args)[0],))}
    got = beside_peak(parts, size)
    yield line(
        "sampler/prefill",
        size.name,
        got.seconds["prefill"],
        program=prefill,
        flops=arithmetic.forward(shape, rows=P, tokens=n, logits=1),
        tokens=P * n,
        peak=got.peak,
        others=got.others,
        prompts=P,
        prompt=n,
    )
    todo = arithmetic.decoded(n, np.full(P * c.samples, R))
    work, read = arithmetic.decode(shape, **todo), arithmetic.decode_bytes(shape, steps=R - 1, seen=todo["seen"])
    assert got.peak is not None
    bound = max(work / got.peak.flops_per_s, read / got.peak.bytes_per_s)
    yield line(
        "sampler/decode",
        size.name,
        got.seconds["decode"],
        program=decode,
        flops=work,
        tokens=todo["tokens"],
        peak=got.peak,
        others=got.others,
        rows=P * c.samples,
        steps=R - 1,
        chunk=c.chunk,
        bytes=read,
        share_of_roofline=bound / statistics.median(got.seconds["decode"]),
    )


def calls(size: Size, b: Built, params: Any) -> Iterator[Line]:
    """`Sampler.__call__` as training calls it, host work included. Equal lengths are the mean of those that differ."""
    c = b.rollout_sampler().c
    longest, shortest = c.max_response, max(c.max_response // 10, 1)
    mean = (longest + shortest + 1) // 2
    forced = {"equal": equal(mean, longest), "uniform": uniform(shortest, longest)}
    samplers = {"whole": Sampler(b.model, endless(b), b.mesh)} | {
        name: Sampler(Forced(b.model.c, c.eos_ids[0], c.max_prompt, hazard), c, b.mesh) for name, hazard in forced.items()
    }
    asked, key = prompts(b.c, b.model.c.vocab_size), jax.random.key(KEY)
    lengths = {name: s(params, asked, key, version=0).sampled_mask.sum(axis=1) for name, s in samplers.items()}
    parts = {name: Timed(lambda s=s: s(params, asked, key, version=0).tokens) for name, s in samplers.items()}  # type: ignore[misc]
    got = beside_peak(parts, size)
    rate = {name: int(lengths[name].sum()) / statistics.median(got.seconds[name]) for name in samplers}
    for name, n in lengths.items():
        yield line(
            f"sampler/{name}",
            size.name,
            got.seconds[name],
            flops=arithmetic.sampled(b.model.c, prompts=len(asked), prompt=c.max_prompt, lengths=n),
            tokens=int(n.sum()),
            peak=got.peak,
            others=got.others,
            rows=len(n),
            lengths=[int(n.min()), float(n.mean()), int(n.max())],
            chunk=c.chunk,
            **({"of_equal": rate[name] / rate["equal"]} if name == "uniform" else {}),
        )


def endless(b: Built) -> Decoding:
    """The rollouts' settings without an end token: every row goes to the limit."""
    return dataclasses.replace(b.rollout_sampler().c, eos_ids=())
