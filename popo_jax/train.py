"""`popo train`: the loop. One step is: sample, grade, fill, assemble, update, store; the box of the paper in that order.

In time: train_step(k) is dispatched, sampling for k + 1 starts in a worker thread, then StepOut(k) is read, stored and
logged. Checkpoint k holds the parameters after update k, the buffer after store(k), and the data position of step k + 1.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from popo_jax import journal
from popo_jax.build import Built
from popo_jax.config import Config
from popo_jax.data.arrange import arrange, put_back
from popo_jax.data.assemble import assemble
from popo_jax.data.pictures import Shown
from popo_jax.data.selection import Mopps
from popo_jax.replay.buffer import Buffer
from popo_jax.replay.fill import candidates, fill, to_store
from popo_jax.rl.rollout import Collector, Rollout, divergences, lay_out
from popo_jax.rl.state import Batch, Params, StepOut, TrainState, batch_specs
from popo_jax.run_dir import Progress
from popo_jax.runtime.clocks import Clock
from popo_jax.runtime.mesh import fetch, place
from popo_jax.runtime.peers import Peers
from popo_jax.sharding import BATCH
from popo_jax.types import FillPlan, UserError

NONFINITE_LIMIT = 3
"""Steps in a row without a finite loss and gradient that stop the run."""
MISMATCH_LIMIT = {"float32": 1e-4, "bfloat16": 3e-2}
"""Mean |sampler's log-prob - trainer's| over a first step's fresh tokens beyond which a run is refused."""


@dataclass(frozen=True, eq=False)
class Parts:
    """What the loop works with; assembled in `launch`."""

    c: Config
    built: Built
    collect: Collector
    buffer: Buffer
    selection: Mopps | None
    evaluate: Callable[[Params, int], dict[str, float]]
    journal: journal.Journal
    clock: Clock
    save: Callable[[TrainState, Progress, float | None], None]
    stopping: Callable[[], bool]
    """Does any process wish to stop?"""
    peers: Peers = Peers()
    shown: Shown | None = None
    """What prompts show, if the policy sees."""


def loop(parts: Parts, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
    """Train from `progress` to the last step, or to the end of the step in which a stop is wished for."""
    c, checked, stop = parts.c, False, parts.stopping()
    if stop and progress.step == 0:
        parts.save(state, progress, None)
    if stop or progress.step >= c.steps:
        return state, progress
    with ThreadPoolExecutor(1, "rollout") as worker:
        pending = worker.submit(parts.collect, state.params, progress.step, progress.position)
        while progress.step < c.steps and not stop:
            began = time.monotonic()
            rollout: Rollout = pending.result()
            seen = parts.selection.observe(rollout.groups) if parts.selection is not None else {}
            plan, batch, order = fill_batch(parts, rollout, state.params, progress.step)
            with parts.clock("update"):
                state, out = parts.built.train_step(state, batch)
            step = progress.step + 1
            scores = {}
            if step % c.eval.every == 0 or step == c.steps:
                with parts.clock("update"):
                    jax.block_until_ready(state.params)
                scores = parts.evaluate(state.params, step)
            if step < c.steps:
                pending = worker.submit(parts.collect, state.params, step, rollout.position)
            with parts.clock("update"):
                metrics = {k: float(v) for k, v in fetch(out.metrics).items()}
            progress = advance(progress, rollout, metrics, c)
            replayed = store(parts, rollout, plan, out, order, progress.step)
            kept = {} if parts.shown is None else {"images/cache_mb": parts.shown.gallery.nbytes / 1e6}
            times = parts.clock.take() | rollout.seconds | kept
            parts.journal.step(progress, rollout, plan, seen | replayed | metrics | scores | times, time.monotonic() - began)
            if not checked and any(rollout.slots[s].token_mask.any() for s in (plan.counted & ~plan.replaced).nonzero()[0]):
                check_agreement(metrics, progress, c)
                checked = True
            check_progress(progress, c)
            stop = parts.stopping()
            if step % c.checkpoint.every == 0 or step == c.steps or stop:
                parts.save(state, progress, scores.get("eval/accuracy"))
    return state, progress


def fill_batch(parts: Parts, rollout: Rollout, params: Params, step: int) -> tuple[FillPlan, Batch, np.ndarray]:
    """Decide what every slot trains on, and lay it out on the devices; beside the batch, the order of its rows."""
    c, buffer, preset = parts.c, parts.buffer, parts.c.algorithm.preset
    scores = score_candidates(parts, params, step) if preset.order == "kl" else None
    with parts.clock("replay"):
        extra = c.slots - c.batch.prompts
        plan = fill(buffer, rollout.slots, version=step, preset=preset, seed=c.seed, step=step, extra=extra, divergence=scores)
        parts.peers.same("plan", {f"replay plan of step {step}": plan.digest()})
        shown = None if parts.shown is None else functools.partial(parts.shown.rows, T=c.row_tokens, rows=c.rows)
        rows = assemble(rollout.slots, plan, buffer, T=c.row_tokens, marked_fresh=preset.marked_fresh, shown=shown)
        fields: tuple[dict[str, Any], np.ndarray] = arrange(rows, parts.built.split)
        return plan, place(Batch(**fields[0]), parts.built.mesh, batch_specs()), fields[1]


def score_candidates(parts: Parts, params: Params, step: int) -> dict[int, float]:
    """popo-kl: divergence of the newest stored groups from the current policy, by one program of fixed shape."""
    c = parts.c
    assert c.replay.candidates is not None  # resolved
    groups = candidates(parts.buffer, version=step, n=c.replay.candidates)
    if not groups:
        return {}
    rows = c.replay.candidates * c.batch.group_size
    seen = () if parts.shown is None else (parts.shown.rows(groups, c.row_tokens, rows),)
    placed = place((lay_out(groups, c.row_tokens, rows), *seen), parts.built.mesh, BATCH)
    logp = fetch(parts.built.score(params, *placed))
    return divergences(groups, logp)


def store(parts: Parts, rollout: Rollout, plan: FillPlan, out: StepOut, order: np.ndarray, version: int) -> dict[str, float]:
    """Put what this step trained on into the buffer; returns the replay metrics."""
    with parts.clock("replay"):
        logp_start = put_back(fetch(out.logp_start), order)
        keep = to_store(rollout.slots, parts.c.algorithm.preset)
        refused = parts.buffer.store([rollout.slots[s] for s in keep], logp_start, slots=keep, version=version)
    ages = plan.age[plan.replaced]
    return {
        "replay/filled": float(plan.replaced.sum()),
        "replay/unfilled": float((~plan.counted).sum()),
        "replay/size": float(len(parts.buffer)),
        "replay/refused": float(refused),
        "replay/mb": parts.buffer.nbytes / 1e6,
        "replay/age_mean": float(ages.mean()) if len(ages) else float("nan"),
        "replay/age_max": float(ages.max()) if len(ages) else float("nan"),
    }


def advance(progress: Progress, rollout: Rollout, metrics: dict[str, float], c: Config) -> Progress:
    """Counters after one more step."""
    tokens = sum(int(g.sampled_mask.sum()) for g in rollout.groups)
    return dataclasses.replace(
        progress,
        step=progress.step + 1,
        position=rollout.position,
        rollouts_total=progress.rollouts_total + sum(len(g.lengths) for g in rollout.groups),
        tokens_generated_total=progress.tokens_generated_total + tokens,
        dead_steps=0 if any(g.effective for g in rollout.groups) else progress.dead_steps + 1,
        nonfinite_steps=progress.nonfinite_steps + 1 if metrics["update/nonfinite"] else 0,
    )


def check_agreement(metrics: dict[str, float], progress: Progress, c: Config) -> None:
    """Errors: UserError when sampler and trainer disagree on the step's own counted tokens, of which it has some.

    Top-k and top-p change the sampler's log-probs by intent.
    """
    limit = MISMATCH_LIMIT[c.model.dtype]
    full = c.sample.top_k is None and c.sample.top_p == 1
    if full and not metrics["mismatch/mean"] <= limit:
        raise UserError(
            f"step {progress.step}: sampler and trainer must agree on log-probs within {limit} on average ({c.model.dtype}), "
            f"got {metrics['mismatch/mean']:.3g}"
        )


def check_progress(progress: Progress, c: Config) -> None:
    """Errors: UserError when the run cannot go on: no signal, or no finite loss, for too many steps in a row."""
    if progress.dead_steps >= c.algorithm.dead_steps:
        raise UserError(
            f"step {progress.step}: {progress.dead_steps} steps in a row without one effective group, which looks like a dead "
            f"verifier or a task far too hard or easy; read samples/ of the last steps"
        )
    if progress.nonfinite_steps >= NONFINITE_LIMIT:
        raise UserError(
            f"step {progress.step}: loss or gradient was not finite in {progress.nonfinite_steps} steps in a row, none applied"
        )
