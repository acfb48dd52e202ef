"""The host's part of replay: fill, assemble and store, on a full buffer and a batch of which half is ineffective."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.suite.measure import Timed, rounds
from benchmarks.suite.report import Line, line
from benchmarks.suite.sizes import Size
from popo_jax.config import Config
from popo_jax.data.assemble import assemble
from popo_jax.replay.buffer import Buffer
from popo_jax.replay.fill import fill, to_store
from popo_jax.types import FillPlan, Group

VERSION = 8
"""Updates applied before the step that is measured; the stored groups are of the versions before."""


def run(size: Size) -> Iterator[Line]:
    """fill, assemble, store of one step."""
    c, P = size.train, size.train.batch.prompts
    arrays = full_buffer(c).arrays()
    fresh = step_groups(c, VERSION)
    logp = np.full((c.rows, c.row_tokens), -1.0, np.float32)
    keep = to_store(fresh, c.algorithm.preset)

    def stored() -> tuple[Buffer]:
        return (Buffer.from_arrays(c.replay, arrays),)

    def plan(buffer: Buffer) -> FillPlan:
        return fill(buffer, fresh, version=VERSION, preset=c.algorithm.preset, seed=0, step=VERSION)

    def planned() -> tuple[Buffer, FillPlan]:
        buffer = stored()[0]
        return buffer, plan(buffer)

    def lay_out(buffer: Buffer, plan: FillPlan) -> dict[str, np.ndarray]:
        return assemble(fresh, plan, buffer, T=c.row_tokens, marked_fresh=False)

    def store(buffer: Buffer) -> int:
        return buffer.store([fresh[s] for s in keep], logp, slots=keep, version=VERSION + 1)

    parts = {"fill": Timed(plan, stored), "assemble": Timed(lay_out, planned), "store": Timed(store, stored)}
    got = rounds(parts, seconds=size.seconds / 2)
    replaced = int(planned()[1].replaced.sum())
    tokens = sum(len(g.tokens) for g in fresh)
    moved = {"fill": None, "assemble": tokens, "store": sum(len(fresh[s].tokens) for s in keep)}
    shapes = {"groups": P, "replaced": replaced, "stored": len(keep), "buffer": len(stored()[0])}
    shapes |= {"buffer_bytes": sum(x.nbytes for x in arrays.values())}
    for name, n in moved.items():
        yield line(f"replay/{name}", size.name, got.seconds[name], tokens=n, others=got.others, **shapes)


def full_buffer(c: Config) -> Buffer:
    """As many groups as it holds, P of a version, all effective."""
    buffer = Buffer(c.replay)
    steps = -(-buffer.capacity // c.batch.prompts)
    for version in range(VERSION - steps, VERSION):
        groups = step_groups(c, version, effective=1)
        logp = np.full((c.rows, c.row_tokens), -1.0, np.float32)
        buffer.store(groups, logp, slots=range(len(groups)), version=version + 1)
    return buffer


def step_groups(c: Config, version: int, *, effective: int = 2) -> list[Group]:
    """P random groups, one in `effective` of them effective."""
    return [group(c, version, p, "effective" if p % effective == 0 else "all_wrong") for p in range(c.batch.prompts)]


def group(c: Config, version: int, p: int, signal: Any) -> Group:
    """G rows of a full prompt and 1 to R sampled tokens."""
    G, n, R = c.batch.group_size, c.sample.max_prompt_tokens, c.sample.max_response_tokens
    rng = np.random.default_rng([version % (1 << 31), p])
    lengths = (n + rng.integers(1, R + 1, G)).astype(np.int32)
    N = int(lengths.sum())
    correct = (np.arange(G) % 2 if signal == "effective" else np.zeros(G)).astype(np.float32)
    sampled = np.concatenate([np.arange(x) >= n for x in lengths])
    return Group(
        id=(version + (1 << 20)) * c.batch.prompts + p,
        prompt_id=f"problem-{p}",
        task="countdown",
        version=version,
        signal=signal,
        lengths=lengths,
        tokens=rng.integers(1, 99, N).astype(np.int32),
        sampled_mask=sampled,
        token_mask=sampled,
        logp_sampler=np.where(sampled, -1.0, 0.0).astype(np.float32),
        score=correct,
        correct=correct,
        adv=(correct - correct.mean()).astype(np.float32),
        ended=np.ones(G, bool),
        texts=_texts(G),
        reasons=_texts(G),
    )


def _texts(G: int) -> tuple[str, ...]:
    words: Sequence[str] = ("3*(5+7)", "right", "wrong value")
    return tuple(words[g % 3] for g in range(G))
