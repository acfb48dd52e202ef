"""The programs of a config compiled for chips that are not here, each once, and measured. They are the very functions that
training jits (`build`, `sampling`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax

from popo_jax import build
from popo_jax.build import Built
from popo_jax.config import Config
from popo_jax.costs.chips import Chip
from popo_jax.costs.count import Count, count
from popo_jax.costs.hlo import parse
from popo_jax.costs.kernels import kernel_flops
from popo_jax.model_config import MODEL_HOW, ModelConfig
from popo_jax.plan.figures import Memory, Program, wave
from popo_jax.rl.state import abstract_batch
from popo_jax.runtime.mesh import mesh_of

UNITS = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
_USED = re.compile(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT])")


class Programs:
    """Those of one policy on one topology, by config."""

    def __init__(self, chip: Chip, devices: Sequence[Any], model: ModelConfig, say: Callable[[str], None]):
        self.chip, self.devices, self.model, self._say = chip, devices, model, say
        self._trained: dict[str, Program] = {}
        self._sampled: dict[str, dict[str, Program]] = {}

    def all(self, c: Config) -> dict[str, Program]:
        return {"train": self.train(c)} | self.sample(c)

    def built(self, c: Config) -> Built:
        """Errors: UserError for a mesh of another number of chips, or rows that it does not divide."""
        c = replace(c, batch=replace(c.batch, length_buckets=1))  # the longest has the peak, and shorter ones are programs more
        model = replace(self.model, **{name: getattr(c.model, name) for name in MODEL_HOW})
        return build.build(c, model, eos_ids=(1,), mesh=mesh_of(c, self.devices))

    def train(self, c: Config) -> Program:
        built = self.built(c)
        unread = replace(built.split, sample=replace(c.sample, max_rows=None))  # of what the step does not depend on
        key = f"{unread} {built.model.c}"
        if key not in self._trained:
            self._say(f"  compiling the train step, {built.split.batch.micro_batch} rows at once")
            reference = build.shard_bytes(built.abstract_state.params) if c.loss.kl_coef else 0.0
            try:
                done = built.train_step.lower(built.abstract_state, abstract_batch(built.split, built.model.c)).compile()  # type: ignore[attr-defined]
                counted = _counted(done, loops=float(built.split.micro_batches))
                self._trained[key] = Program(_memory(done, resident=reference), counted)
            except jax.errors.JaxRuntimeError as e:
                self._trained[key] = Program(_too_much(e, resident=reference))
        return self._trained[key]

    def sample(self, c: Config) -> dict[str, Program]:
        """cast, prefill, decode and take (what drops finished rows) of a full wave of prompts, beside the train state."""
        built = self.built(c)
        sampler = built.rollout_sampler()
        prompts = wave(c)
        key = f"{sampler.c} {prompts} {built.mesh.shape} {built.model.c}"
        if key not in self._sampled:
            self._say(f"  compiling the sampler, {prompts * c.batch.group_size} rows at once")
            self._sampled[key] = self._sampler(built, sampler, prompts)
        return self._sampled[key]

    def _sampler(self, built: Built, sampler: Any, prompts: int) -> dict[str, Program]:
        c, found = built.model.c, dict[str, Program]()
        state, params = build.shard_bytes(built.abstract_state), build.shard_bytes(built.abstract_state.params)
        state += params if built.c.loss.kl_coef else 0  # the reference stays
        resident = {"cast": state - params, "prefill": state, "decode": state, "take": state}  # the cast reads the parameters
        cache = 0.0
        try:
            for name, done, results in sampler.programs(built.abstract_state.params, prompts):
                counted = _counted(done, loops=1.0) if name == "decode" else None
                read = cache / c.layers if name == "take" else cache  # it reads one layer's
                memory = _memory(done, cache=read, resident=resident[name])
                found[name] = Program(replace(memory, cache=cache), counted)
                cache = build.shard_bytes(results[0].cache) if name == "prefill" else cache
                resident["take"] += build.shard_bytes(results) if name == "cast" else 0  # it does not read the weights
        except jax.errors.JaxRuntimeError as e:
            name = next(name for name in resident if name not in found)
            found[name] = Program(_too_much(e, resident=resident[name]))
        return found


def _memory(done: Any, *, cache: float = 0.0, resident: float = 0.0) -> Memory:
    m = done.memory_analysis()
    temporaries = m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return Memory(m.argument_size_in_bytes - cache, cache, temporaries, m.generated_code_size_in_bytes, resident)


def _counted(done: Any, *, loops: float) -> Count:
    """loops: how often a loop runs whose end is data: over micro-batches, all of them; over tokens, once."""
    return count(parse(done.as_text()), trips=lambda _: loops, kernel=kernel_flops)


def _too_much(e: jax.errors.JaxRuntimeError, *, resident: float) -> Memory:
    """What the compiler wanted of HBM. Errors: anything else that it says."""
    found = _USED.search(str(e))
    if "RESOURCE_EXHAUSTED" not in str(e) or found is None:
        raise e
    return Memory(temporaries=float(found[1]) * UNITS[found[2]], resident=resident)
