"""A trainer small enough for a test: 2 layers of width 32, 4 prompts x 4 responses, assembled like `launch` does it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from popo_jax import build, journal, plain, problems, run_dir, sft, train
from popo_jax.build import Built
from popo_jax.config import Config, from_dict
from popo_jax.data.selection import Mopps
from popo_jax.data.stream import PromptStream
from popo_jax.data.tokenizer import Tokenizer, characters
from popo_jax.replay.buffer import Buffer
from popo_jax.rl.rollout import Collector
from popo_jax.rl.state import TrainState
from popo_jax.rules import resolve
from popo_jax.run_dir import Progress, RunDir
from popo_jax.runtime.clocks import Clock
from popo_jax.runtime.console import Console
from popo_jax.runtime.mesh import make_mesh
from popo_jax.runtime.writers import Loggers
from popo_jax.tasks.pool import grade_all
from popo_jax.types import Verdict

BASE: dict[str, Any] = {
    "steps": 4,
    "tasks": [{"name": "countdown", "countdown": {"train_problems": 64, "eval_problems": 16}}],
    "model": {"layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp": 64},
    "batch": {"prompts": 4, "group_size": 4},
    "sample": {"max_prompt_tokens": 24, "max_response_tokens": 6, "chunk": 4},
    "optim": {"learning_rate": 1e-2},
    "eval": {"every": 2, "problems": 16},
    "checkpoint": {"every": 2},
    "warm_start": {"steps": 4, "batch": 8},
}
TOKENIZER = characters()
SEES: dict[str, Any] = {
    "tasks": [
        {"name": "geometry", "geometry": {"kinds": ["length"], "low": 1, "high": 9, "train_problems": 64, "eval_problems": 16}}
    ],
    "model__family": "qwen2_5_vl",
    "model__vision": {
        "layers": 2,
        "width": 16,
        "heads": 2,
        "mlp": 24,
        "patch": 14,
        "merge": 2,
        "window": 28,
        "full_layers": [1],
        "mrope": [2, 3, 3],
    },
}
"""Settings of a policy with eyes: four tokens of an image, of a window each."""
SEES["tasks"][0]["geometry"]["instruction"] = ""
EYES = characters(sees=True)


def config(**dotted: Any) -> Config:
    """BASE with dotted overrides, dots written as two underscores."""
    over = plain.nest({k.replace("__", "."): v for k, v in dotted.items()})
    return resolve(from_dict(plain.merge(BASE, over)))


def built(c: Config, tokenizer: Tokenizer = TOKENIZER) -> Built:
    shape = dataclasses.replace(c.model, vocab_size=tokenizer.vocab_size)
    if c.model.sees:
        shape = sft.fresh_policy(c).model
        c = problems.with_sizes(c, problems.load(c, tokenizer, shape))
    return build.build(c, shape, eos_ids=tokenizer.eos_ids, mesh=make_mesh(c))


def sharp(params: Any, factor: float = 4.0) -> Any:
    """Random parameters scaled up, so that the policy has opinions."""
    return jax.tree.map(lambda x: x * factor if x.ndim > 1 else x, params)


def state(b: Built, seed: int = 0) -> TrainState:
    return b.state(jax.device_put(sharp(b.fresh_params(jax.random.key(seed))), b.shardings))


def parts(
    path: Path,
    c: Config,
    *,
    grade: Callable[..., list[Verdict]] = grade_all,
    b: Built | None = None,
    tokenizer: Tokenizer = TOKENIZER,
) -> train.Parts:
    """Everything `train.loop` needs; metrics, samples and replays go to `path`."""
    b = built(c, tokenizer) if b is None else b
    clock, run = Clock(), RunDir.at(path)
    c, sources = b.c, problems.load(c, tokenizer, b.model.c)
    stream = PromptStream(sources.train, seed=c.seed)
    selection = Mopps(c.selection, seed=c.seed) if c.selection.method == "mopps" else None
    choose = selection.choose if selection is not None else None
    shown = sources.shown
    scenes = shown.scenes if shown is not None else None
    collect = Collector(c, b.rollout_sampler(), grade, tokenizer.decode, stream, None, choose, Clock, scenes)
    book = journal.Journal(run, Loggers((), run.path, {}), Console())
    nothing = lambda *_: None  # noqa: E731
    parts = train.Parts(c, b, collect, Buffer(c.replay), selection, lambda *_: {}, book, clock, nothing, lambda: False)
    return dataclasses.replace(parts, shown=shown)


def by_pattern(steps: list[list[str]], G: int = 4) -> Callable[..., list[Verdict]]:
    """A verifier that ignores the text: call n gives the kinds steps[n] (the last for ever), one per prompt."""
    rows = {"mixed": [1, 0, 0, 1], "all right": [1] * G, "all wrong": [0] * G, "rare": [0, 0, 0, 1]}
    calls = iter(steps)
    last: list[str] = []

    def grade(jobs: Any) -> list[Verdict]:
        nonlocal last
        last = next(calls, last)
        flat = np.concatenate([rows[k] for k in last])
        assert len(flat) == len(jobs)
        return [Verdict(float(x), float(x), "scripted") for x in flat]

    return grade


def run(path: Path, c: Config, **kw: Any) -> tuple[TrainState, Progress, train.Parts]:
    """Train from step 0 to the end."""
    path.mkdir(parents=True, exist_ok=True)
    p = parts(path, c, **kw)
    final, progress = train.loop(p, state(p.built), Progress())
    return final, progress, p


__all__ = ["BASE", "TOKENIZER", "built", "by_pattern", "config", "parts", "run", "run_dir", "sharp", "state"]
