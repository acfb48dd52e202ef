"""Which settings fit: the largest of each that may be changed alone, and single changes that make everything fit."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from jax.experimental import topologies

from popo_jax import split
from popo_jax.config import Config, MeshConfig
from popo_jax.costs.chips import chip
from popo_jax.model_config import ModelConfig
from popo_jax.plan.compiled import Programs
from popo_jax.plan.figures import Plan, fit
from popo_jax.types import UserError

DOUBT = 1.1
"""Times the limit: more than that and a size is taken as not fitting without being compiled."""


def plan(c: Config, model: ModelConfig, topology: str, say: Callable[[str], None]) -> Plan:
    """Errors: UserError for an unknown topology, no libtpu, or settings that the chips cannot divide."""
    began, kind, devices = time.monotonic(), chip(topology), _devices(topology)
    programs = Programs(kind, devices, model, say)
    c = _meshed(c, len(devices), say)
    if c.batch.micro_batch == "auto":
        c = split.with_micro(c, _largest_micro(c, programs) or _micros(c, programs)[0])
    built = programs.built(c)
    out = Plan(topology, kind, len(devices), split.with_micro(c, built.split.batch.micro_batch), built.model.c, {})  # type: ignore[arg-type]
    out.programs = programs.all(out.c)
    largest = {"batch.micro_batch": _largest_micro(out.c, programs), "sample.max_rows": _largest_rows(out.c, programs)}
    out.largest = {name: n for name, n in largest.items() if n is not None}
    if not out.fits:
        out.advice = list(_advice(out, programs))
    out.seconds = time.monotonic() - began
    return out


def _devices(topology: str) -> list[Any]:
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as e:  # as many kinds as there are causes
        said = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise UserError(
            f"popo plan: libtpu must be installed (pip install 'popo-jax[plan]') and know {topology}, got: {said}"
        ) from e


def _meshed(c: Config, n: int, say: Callable[[str], None]) -> Config:
    """With the config's mesh, or the weights over all chips where it is of another number of them."""
    m = c.mesh
    fixed = m.fsdp * m.tensor
    if fixed * m.data == n if m.data is not None else n % fixed == 0:
        return c
    say(f"the config's mesh is of another number of chips than {n}: planned with --mesh.fsdp {n}")
    return replace(c, mesh=MeshConfig(fsdp=n))


def _advice(p: Plan, programs: Programs) -> Iterator[str]:
    """Another mesh only where nothing simpler helps, and one of them: it is another train step and another sampler to compile."""

    def fitting(changes: Iterable[tuple[str, Config]]) -> Iterator[str]:
        for told, changed in changes:
            try:
                good = fit(programs.all(changed).values(), p.chip)
            except UserError:  # it cannot be split so
                continue
            if good:
                yield told

    found = list(fitting(_settings(p)))
    yield from found or itertools.islice(fitting(_meshes(p)), 1)


def _settings(p: Plan) -> Iterator[tuple[str, Config]]:
    c = p.c
    for name, n in p.largest.items():
        changed = split.with_micro(c, n) if name == "batch.micro_batch" else _with_rows(c, n)
        if changed != c:
            yield f"--{name.replace('_', '-')} {n}", changed
    if c.model.remat != "full":
        yield "--model.remat full", replace(c, model=replace(c.model, remat="full"))


def _meshes(p: Plan) -> Iterator[tuple[str, Config]]:
    """The weights over all chips; and two of them to a row as well, which is first where the sampler does not fit: it has whole
    weights on each of (data, fsdp)."""
    c, m, found = p.c, p.c.mesh, []
    if m.fsdp * m.tensor < p.chips:
        found.append((f"--mesh.fsdp {p.chips // m.tensor}", replace(m, data=None, fsdp=p.chips // m.tensor)))
    if p.chips % (2 * m.tensor) == 0 and p.model.kv_heads % (2 * m.tensor) == 0:
        fsdp, tensor = p.chips // (2 * m.tensor), 2 * m.tensor
        found.append((f"--mesh.fsdp {fsdp} --mesh.tensor {tensor}", replace(m, data=None, fsdp=fsdp, tensor=tensor)))
    sampled = [program for name, program in p.programs.items() if name != "train"]
    for told, mesh in found if fit(sampled, p.chip) else found[::-1]:
        yield told, replace(c, mesh=mesh)


def _micros(c: Config, programs: Programs) -> list[int]:
    return split.possible(c, _shards(c, programs), "tpu")


def _shards(c: Config, programs: Programs) -> int:
    return len(programs.devices) // c.mesh.tensor


def _largest_micro(c: Config, programs: Programs) -> int | None:
    own = c.batch.micro_batch if isinstance(c.batch.micro_batch, int) else None
    sizes, limit = _micros(c, programs), programs.chip.hbm_bytes
    return _largest(sizes, lambda n: programs.train(split.with_micro(c, n)).memory.total, limit, own)


def _largest_rows(c: Config, programs: Programs) -> int | None:
    """Of waves of whole groups that fill every shard alike."""
    G, P, shards = c.batch.group_size, c.batch.prompts, _shards(c, programs)
    waves = [n * G for n in range(1, P + 1) if P % n == 0 and n * G % shards == 0]

    def need(rows: int) -> float:
        return max(p.memory.total for p in programs.sample(_with_rows(c, rows)).values())

    return _largest(waves, need, programs.chip.hbm_bytes, c.sample.max_rows or c.rows)


def _with_rows(c: Config, rows: int) -> Config:
    return replace(c, sample=replace(c.sample, max_rows=rows))


def _largest(sizes: Sequence[int], need: Callable[[int], float], limit: float, own: int | None = None) -> int | None:
    """The largest of ascending sizes whose need is within the limit; None: not even the first.

    The need is nearly a line in the size: two tell it (the smallest, and `own`, which is known already, or the next), then the
    size it tells is tried, and the one after where that is in doubt.
    """
    if not sizes or need(sizes[0]) > limit:
        return None
    if len(sizes) == 1:
        return sizes[0]
    first = need(sizes[0])
    other = own if own is not None and own in sizes[1:] and need(own) <= limit else sizes[1]
    slope = max((need(other) - first) / (other - sizes[0]), 1.0)

    def told(i: int) -> float:
        return first + slope * (sizes[i] - sizes[0])

    at = max(i for i in range(len(sizes)) if told(i) <= limit)
    while at > 0 and need(sizes[at]) > limit:
        at -= 1
    while at + 1 < len(sizes) and told(at + 1) <= DOUBT * limit and need(sizes[at + 1]) <= limit:
        at += 1
    return sizes[at]
