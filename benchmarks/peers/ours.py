"""Ours, in all three cases, as `popo train` builds and runs them: POPO's programs with the preset `grpo`."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.peers import case
from benchmarks.peers.worker import WARM, Gate, micro_batch, serve
from popo_jax import build, train
from popo_jax.build import Built
from popo_jax.config import from_dict
from popo_jax.data import tokenizer
from popo_jax.journal import Journal
from popo_jax.models import hf
from popo_jax.replay.buffer import Buffer
from popo_jax.rl.rollout import Collector
from popo_jax.rl.state import Batch, Params
from popo_jax.rules import resolve
from popo_jax.run_dir import Progress, RunDir
from popo_jax.runtime import mesh
from popo_jax.runtime.clocks import Clock
from popo_jax.runtime.console import Console
from popo_jax.runtime.writers import Loggers
from popo_jax.sharding import BATCH
from popo_jax.types import Prompt, Verdict


def config(algorithm: str, micro_batch: int | None) -> dict[str, Any]:
    """Both cases that train have PROMPTS x GROUP rows."""
    return {
        "algorithm": algorithm,
        "batch": {"prompts": case.PROMPTS, "group_size": case.GROUP, "micro_batch": micro_batch},
        "sample": {"max_prompt_tokens": case.PROMPT, "max_response_tokens": case.RESPONSE},
        "loss": {"clip_low": case.CLIP, "clip_high": case.CLIP},
        "optim": {
            "learning_rate": case.LEARNING_RATE,
            "b1": case.B1,
            "b2": case.B2,
            "eps": case.EPS,
            "grad_clip": case.GRAD_CLIP,
        },
        "steps": 10**6,
    }


def built(inputs: Path, algorithm: str = "grpo") -> tuple[Built, Params]:
    c = resolve(from_dict(config(algorithm, micro_batch())))
    b = build.build(c, hf.read_config(inputs / "policy"), eos_ids=(case.EOS,), mesh=mesh.make_mesh(c))
    return b, hf.load(inputs / "policy", hf.read_config(inputs / "policy"), b.shardings)


def sample(gate: Gate) -> None:
    b, params = built(gate.inputs)
    prompts, sampler = list(np.load(gate.inputs / "prompts.npy")[: case.SAMPLE_ROWS]), b.sampler(samples=1, temperature=1.0)
    keys = (jax.random.key(i) for i in itertools.count())

    def step() -> int:
        responses = sampler(params, prompts, next(keys), version=0)
        gate.facts["distinct"] = len(np.unique(responses.tokens))
        return int(responses.sampled_mask.sum())

    serve(gate, step)


def train_step(gate: Gate) -> None:
    """The clip is taken around the batch's old log-probs, as the peers do: the preset popo-behav, every row replayed."""
    b, params = built(gate.inputs, "popo-behav")
    data = np.load(gate.inputs / "batch.npz")
    per_row = {"adv": data["adv"], "fresh": np.zeros(b.c.rows, bool), "version": np.zeros(b.c.rows, np.int32)}
    masks = {"sampled_mask": data["mask"], "token_mask": data["mask"]}
    old = {"logp_behav": data["logp_old"], "logp_sampler": data["logp_old"]}
    fields: dict[str, Any] = {"tokens": data["tokens"], **masks, **old, **per_row}
    batch = mesh.place(Batch(**fields), b.mesh, BATCH)
    state = b.state(params)
    checked: list[tuple[float, float]] = gate.facts.setdefault("loss_and_norm", [])

    def step() -> int:
        nonlocal state
        state, out = b.train_step(state, batch)
        metrics = mesh.fetch(out.metrics)
        jax.block_until_ready(state)
        if len(checked) < WARM:
            checked.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        return batch.tokens.size

    serve(gate, step)


class Prompts:
    """The prompt stream: prompt i is row i of the inputs, over and over."""

    def __init__(self, inputs: Path) -> None:
        self._tokens = np.load(inputs / "prompts.npy")
        self._texts = case.texts(self._tokens.tolist())

    def __call__(self, position: int, n: int) -> list[Prompt]:
        at = [i % len(self._texts) for i in range(position, position + n)]
        return [Prompt(str(i), "vowels", self._texts[i], self._tokens[i], {}) for i in at]


def grade(jobs: Any) -> list[Verdict]:
    return [Verdict(score, score, "") for score in (case.reward(text) for _, text, _ in jobs)]


def whole_step(gate: Gate) -> None:
    """`train.loop` itself, with the run's files; each round is one call of it, so that no step overlaps a peer's round."""
    b, params = built(gate.inputs)
    tok, run = tokenizer.load(gate.inputs / "policy"), RunDir.at(tempfile.mkdtemp())
    collect = Collector(b.c, b.rollout_sampler(), grade, tok.decode, Prompts(gate.inputs), None, None, Clock)
    journal = Journal(run, Loggers((), run.path, {}), Console(quiet=True))
    nothing = lambda *_: None  # noqa: E731
    parts = train.Parts(b.c, b, collect, Buffer(b.c.replay), None, lambda *_: {}, journal, Clock(), nothing, lambda: False)
    state, progress = b.state(params), Progress()
    while True:
        steps, before = gate.left, progress.tokens_generated_total
        c = dataclasses.replace(b.c, steps=progress.step + steps)
        state, progress = train.loop(dataclasses.replace(parts, c=c), state, progress)
        jax.block_until_ready(state)
        gate.step(progress.tokens_generated_total - before, steps)


CASES = {"sample": sample, "train": train_step, "step": whole_step}

if __name__ == "__main__":
    mesh.start()
    gate = Gate(("popo_jax", "jax", "jaxlib"))
    CASES[gate.case](gate)
