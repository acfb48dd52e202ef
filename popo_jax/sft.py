"""`popo sft`: a fresh policy learns the response format from a generated teacher, right in a minority of its answers.

`popo train` calls it by itself when its config names no policy, and keeps the result for the next run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh, PartitionSpec

import popo_jax.policy as policies
from popo_jax import build, plain, problems
from popo_jax.config import Config, OptimConfig
from popo_jax.data import stream
from popo_jax.data.stream import Example
from popo_jax.data.tokenizer import VISION, characters
from popo_jax.models import lora
from popo_jax.models.hub import locate
from popo_jax.policy import Policy
from popo_jax.rl.optim import make_tx
from popo_jax.rl.state import Params, Purpose, TrainState, key_for
from popo_jax.runtime import mesh as meshes
from popo_jax.runtime.mesh import cache_dir
from popo_jax.runtime.peers import Peers
from popo_jax.sharding import BATCH, row_shards
from popo_jax.task_config import TASK_NAMES
from popo_jax.tasks import get_task
from popo_jax.tasks.tags import split_thinking
from popo_jax.types import UserError

REPORTS = 5
"""How often a warm start says where it is."""
FORMAT = 2
"""Raise it when the same settings should give another warm start."""


def starting_policy(c: Config, mesh: Mesh, say: Callable[[str], None], peers: Peers) -> epath.Path:
    """Folder of the policy the run starts from; made now if the config names none and the cache of some process has none."""
    if c.policy.path is not None:
        return locate(c.policy.path)
    fresh = fresh_policy(c)
    folder = cache_dir() / "warm_start" / cache_key(c, fresh)
    if all(peers.tell("warm start", (folder / "config.json").exists())):
        say(f"The config names no policy: starting from the warm start kept in {folder}")
        return folder
    say("The config names no policy: teaching a fresh one the format first (kept for the next run)")
    make(c, mesh, folder, say)
    return folder


def make(c: Config, mesh: Mesh, folder: epath.PathLike, say: Callable[[str], None]) -> None:
    """Warm-start a fresh policy and write it to `folder`, whole or not at all; if another process was faster, its stays."""
    folder, policy = epath.Path(folder), fresh_policy(c)
    params = meshes.whole(warm_start(c, policy, mesh, say))
    partial = folder.parent / f".{folder.name}.{jax.process_index()}-{os.getpid()}.partial"
    policies.save(partial, policy, params)
    try:
        partial.rename(folder)
    except OSError:  # it was there first
        partial.rmtree()
    say(f"Warm start written to {folder}")


def fresh_policy(c: Config) -> Policy:
    tokenizer = characters(sees=c.model.sees)
    size = tokenizer.vocab_size if c.model.vocab_size is None else c.model.vocab_size
    model = replace(lora.without(c.model), vocab_size=size)
    if c.model.sees:
        names = dict(zip(("start_token", "image_token", "end_token"), VISION, strict=False))
        ids: dict[str, Any] = {key: tokenizer.core.token_to_id(name) for key, name in names.items()}
        model = replace(model, vision=replace(policies.scaled(model.vision, c), **ids))
    return policies.checked(Policy(model, tokenizer), "model.vocab_size")


def cache_key(c: Config, fresh: Policy) -> str:
    """Hash of model, tokenizer, tasks, limits and warm-start settings (its seed among them)."""
    others = {*TASK_NAMES, "verifier", "slices"}
    tasks = [{k: v for k, v in plain.to_plain(t).items() if k == t.name or k not in others} for t in c.tasks]
    prints = problems.asked(problems.load(c, fresh.tokenizer, fresh.model))
    parts: Sequence[Any] = (plain.to_plain(lora.without(c.model)), tasks, plain.to_plain(c.warm_start), c.row_tokens)
    identity = [FORMAT, fresh.tokenizer.fingerprint(), prints, *parts]
    identity += [plain.to_plain(fresh.model.vision)] if fresh.model.sees else []  # images.min_pixels and max_pixels are in it
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def warm_start(c: Config, policy: Policy, mesh: Mesh, say: Callable[[str], None]) -> Params:
    """Parameters after `warm_start.steps` of supervised learning."""
    w, shards = c.warm_start, row_shards(mesh.shape)
    if w.batch % shards:
        raise UserError(f"warm_start.batch must be a multiple of the mesh's data x fsdp ({shards}), got {w.batch}")
    sources = problems.load(c, policy.tokenizer, policy.model)
    c = problems.with_sizes(c, sources)
    built = build.build(c, policy.model, eos_ids=policy.tokenizer.eos_ids, mesh=mesh)
    params = built.fresh_params(key_for(w.seed, Purpose.INIT, 0))
    tx = make_tx(OptimConfig(weight_decay=0.01))
    state = TrainState(meshes.place(np.zeros((), np.int32), mesh, PartitionSpec()), params, tx.init(params))
    step = build.supervised(built.model, tx)
    sizes = sources.shown.sizes if sources.shown is not None else None
    shapes = {"batch": w.batch, "T": c.row_tokens, "seed": w.seed, "sizes": sizes}
    batches = iter(stream.supervised(Examples(c, sources), sources.train[0].chat, **shapes))  # type: ignore[arg-type]
    rate = optax.warmup_cosine_decay_schedule(0.0, w.learning_rate, min(20, w.steps // 10), w.steps, w.learning_rate / 10)
    for i in range(w.steps):
        batch = meshes.place(next(batches), mesh, BATCH)
        state, loss = step(state, batch["tokens"], batch["answer_mask"], np.float32(rate(i)), batch.get("images"))
        if (i + 1) % max(w.steps // REPORTS, 1) == 0:
            say(f"  warm start {i + 1}/{w.steps}: loss {float(loss):.3f}")
    return state.params


class Examples:
    """Teacher's examples by index, each drawn anew. Thinking that the prompt opens is closed at once."""

    def __init__(self, c: Config, sources: problems.Problems):
        self._w, self._shown, self._sources = c.warm_start, sources.shown, sources.train
        weights = np.array([s.weight for s in self._sources])
        self._shares = weights / weights.sum()

    def __len__(self) -> int:
        return self._w.steps * self._w.batch

    def __getitem__(self, i: int) -> Example:
        rng = np.random.default_rng([self._w.seed, i])
        source = self._sources[rng.choice(len(self._sources), p=self._shares)] if len(self._sources) > 1 else self._sources[0]
        problem: Mapping[str, Any] = source.problems[int(rng.integers(len(source.problems)))]
        prompt, answer = source.prompt(problem), get_task(source.task).teacher_answer(problem, rng, right=self._w.right)
        thinks = split_thinking(prompt.begun)[1] is None
        scene = self._shown.gallery(prompt.task, prompt.id) if self._shown is not None else None
        return Example(prompt, f"</think>\n{answer}" if thinks else answer, scene)
