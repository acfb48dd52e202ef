"""From a config or a run directory to a running loop: policy, problems, compiled parts, checkpoints, then `train.loop`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from etils import epath

import popo_jax.policy as policies
from popo_jax import build, evaluate, plain, problems, run_dir, sft, train
from popo_jax.build import Built
from popo_jax.config import Config
from popo_jax.data.chat import dated
from popo_jax.data.pictures import Shown
from popo_jax.data.selection import Mopps
from popo_jax.data.stream import PromptStream
from popo_jax.health import Watch
from popo_jax.journal import Journal
from popo_jax.policy import Policy
from popo_jax.problems import GradeFn
from popo_jax.replay.buffer import Buffer
from popo_jax.rl.rollout import Collector, reference_scorer
from popo_jax.rl.state import Params, Purpose, TrainState, key_for
from popo_jax.run_dir import Progress, RunDir, digest, versions
from popo_jax.runtime.checkpoints import Checkpoints
from popo_jax.runtime.clocks import Clock
from popo_jax.runtime.console import Console
from popo_jax.runtime.machine import Meter, counters_found, session
from popo_jax.runtime.mesh import make_mesh, place
from popo_jax.runtime.peers import Peers
from popo_jax.runtime.signals import stop_wish
from popo_jax.runtime.writers import Loggers
from popo_jax.scenes import Scene, blind
from popo_jax.sharding import BATCH
from popo_jax.task_config import PICTURED
from popo_jax.tasks.graders import Graders
from popo_jax.tasks.pool import Job
from popo_jax.types import Group, Prompt, UserError, Verdict


@dataclass(frozen=True, eq=False)
class Start:
    """Where a run begins: fresh at step 0, or restored."""

    state: TrainState
    buffer: Buffer
    selection: Mopps | None
    progress: Progress


def new(c: Config, console: Console, peers: Peers | None = None) -> dict[str, Any]:
    """`popo train CONFIG`: a new run directory, trained to the end. Returns the summary.

    As one of several processes, all of which call this with the same config and see the same run directory.
    """
    with Graders(c) as grade:
        return _new(c, grade, console, peers or Peers())


def resume(c: Config, run: RunDir, step: int | None, console: Console, peers: Peers | None = None) -> dict[str, Any]:
    """`popo train --resume RUN`: from its newest whole checkpoint, or the one of `step`, to the end."""
    with Graders(c) as grade:
        return _resume(c, run, step, grade, console, peers or Peers())


def _new(c: Config, grade: GradeFn, console: Console, peers: Peers) -> dict[str, Any]:
    mesh = make_mesh(c)
    peers.same("config", {"config": digest(c)})
    peers.first("look", lambda: run_dir.create(c, make=False))  # before the warm start; made when nothing can be refused
    folder = sft.starting_policy(c, mesh, console.say, peers)
    policy = policies.describe(folder, c)
    c = policies.with_limits(c, policy.model.vision)
    for sentence in policies.lacks(policy, c):
        console.say(sentence)
    c = replace(c, chat=peers.first("date", lambda: dated(c.chat, policy.tokenizer)))  # of the run's start, in all of it
    sources = problems.load(c, policy.tokenizer, policy.model)
    c = problems.with_sizes(c, sources)
    built = build.build(c, policy.model, eos_ids=policy.tokenizer.eos_ids, mesh=mesh, fit=True)
    peers.same("split", {"batch.micro_batch that auto chose": str(built.split.batch.micro_batch)})
    if c.batch.micro_batch == "auto":  # written down: another machine's choice would round a resumed run otherwise
        c = replace(c, batch=replace(c.batch, micro_batch=built.split.batch.micro_batch, memory_gb=None))
    params = built.load(folder, key_for(c.seed, Purpose.INIT, 0))
    reference = _reference(c, built, folder, sources)
    prints = _fingerprints(policy, sources, grade)
    peers.same("start", prints | versions() | {f"starting policy, {folder},": policies.digest(folder)})
    run = RunDir.at(peers.first("run", lambda: _made(c, prints, policy)))
    if not all(peers.tell("sees", (run.path / "config.yaml").exists())):
        raise UserError(f"all processes must see the run directory {run.path}: on a shared file system; one does not")
    console.say(f"Run directory: {run.path}")
    start = Start(built.state(params), Buffer(c.replay), _selection(c), Progress())
    return _go(c, run, built, policy, sources, prints, grade, start, reference, console, peers)


def _made(c: Config, prints: dict[str, str], policy: Policy) -> str:
    run = run_dir.create(c)
    policies.save(run.path / "policy", policy, None)
    run_dir.write_config(run, c, prints)
    return str(run.path)


def _resume(c: Config, run: RunDir, step: int | None, grade: GradeFn, console: Console, peers: Peers) -> dict[str, Any]:
    mesh, policy = make_mesh(c), policies.describe(run.path / "policy", c)
    peers.same("config", {"config": digest(c)})
    c = policies.with_limits(c, policy.model.vision)
    built = build.build(c, policy.model, eos_ids=policy.tokenizer.eos_ids, mesh=mesh, fit=True)
    peers.same("split", {"batch.micro_batch that auto chose": str(built.split.batch.micro_batch)})
    with _checkpoints(c, run) as checkpoints:
        if not checkpoints.steps():
            raise UserError(f"{run.path} holds no checkpoint yet; start it anew with: popo train {run.path / 'config.yaml'}")
        step = peers.first("from", lambda: checkpoints.steps()[-1] if step is None else step)
        where = f"checkpoint {run.path / 'checkpoints' / str(step)}"
        meta = checkpoints.read_meta(step)
        run_dir.check_settings(meta, c, policy.tokenizer.fingerprint(), where)
        sources = problems.load(c, policy.tokenizer, policy.model)
        prints = _fingerprints(policy, sources, grade)
        progress = run_dir.check_meta(meta, prints, where)
        state, arrays, _ = checkpoints.restore(step, built.abstract_state)
    buffer, selection = Buffer.from_arrays(c.replay, arrays), _selection(c)
    _check_shown(buffer, sources.shown, where)
    if selection is not None:
        selection.load(arrays)
    peers.same("start", prints | versions())
    peers.first("rewind", lambda: _rewound(run, step, c, prints))
    console.say(f"Resuming {run.path} after step {step}")
    start = Start(state, buffer, selection, progress)
    folder = sft.starting_policy(c, mesh, console.say, peers) if c.loss.kl_coef else None
    reference = _reference(c, built, folder, sources)
    return _go(c, run, built, policy, sources, prints, grade, start, reference, console, peers)


def _go(
    c: Config,
    run: RunDir,
    built: Built,
    policy: Policy,
    sources: problems.Problems,
    prints: dict[str, str],
    grade: GradeFn,
    start: Start,
    reference: Callable[[list[Group]], list[Group]] | None,
    console: Console,
    peers: Peers,
) -> dict[str, Any]:
    counts = {t.task: (len(t.problems), len(h.problems)) for t, h in zip(sources.train, sources.held_out, strict=True)}
    size = sum(x.size for x in jax.tree.leaves(built.abstract_state.params))
    console.banner(built.split, size, built.model.c.attention, jax.devices(), counts)
    first = peers.index == 0
    shown, decode = sources.shown, policy.tokenizer.decode
    look, files = (shown.gallery, shown.files) if shown is not None else (None, None)
    loggers = Loggers(c.loggers if first else (), run.path, plain.to_plain(c))
    clock, watch, meter = Clock(), Watch(), _meter(peers)
    for row in run.metrics.rows():
        watch.see(row)
    journal = Journal(run, loggers, console, first, files, watch, meter)
    if first:
        run.began(session(start.progress.step, code=run_dir.code_version(), source=versions()["source code"]))
    stream = _shared_stream(PromptStream(sources.train, seed=c.seed, look=look), peers)
    grade = _shared_grade(grade, peers)
    choose = start.selection.choose if start.selection is not None else None
    scenes = shown.scenes if shown is not None else None
    collect = Collector(c, built.rollout_sampler(), grade, decode, stream, reference, choose, Clock, scenes)
    score = _evaluator(c, built, policy, sources, grade, clock, journal)
    with stop_wish() as wish, _checkpoints(c, run) as checkpoints, console:

        def save(state: TrainState, progress: Progress, accuracy: float | None) -> None:
            with clock("checkpoint"):
                meta = run_dir.meta(c, progress, prints)
                arrays = start.buffer.arrays() | (start.selection.arrays() if start.selection is not None else {})
                checkpoints.save(progress.step, state=state, replay=arrays, meta=meta, score=accuracy)

        def stopping() -> bool:
            return any(peers.tell("stop", wish.is_set()))

        parts = train.Parts(c, built, collect, start.buffer, start.selection, score, journal, clock, save, stopping, peers, shown)
        began = time.monotonic()
        if peers.first("rows", lambda: not run.metrics.rows()):
            journal.row({"step": 0} | score(start.state.params, 0))
        _, progress = train.loop(parts, start.state, start.progress)
        checkpoints.wait()
    loggers.close()
    return peers.first("end", lambda: _finish(c, run, progress, time.monotonic() - began, console))


def _meter(peers: Peers) -> Meter:
    """Of a run of one process; of several, no host sees all."""
    devices = jax.devices()
    return Meter(counters_found(devices[0].platform, len(devices)) if peers.count == 1 else {})


def _shared_stream(stream: PromptStream, peers: Peers) -> Callable[[int, int], list[Prompt]]:
    """Each process reads its part of the prompts."""

    def read(position: int, n: int) -> list[Prompt]:
        return peers.shared("prompts", n, lambda part: stream(position + part.start, len(part)))

    return read


def _shared_grade(grade: GradeFn, peers: Peers) -> GradeFn:
    """Each process grades its part of the responses."""

    def graded(jobs: Sequence[Job]) -> list[Verdict]:
        return peers.shared("grade", len(jobs), lambda part: grade([jobs[i] for i in part]))

    return graded


def _finish(c: Config, run: RunDir, progress: Progress, seconds: float, console: Console) -> dict[str, Any]:
    """summary.json, or the sentence that tells how to go on."""
    if progress.step < c.steps:
        console.say(f"Stopped and saved after step {progress.step}; go on with: popo train --resume {run.path}")
    scores = [(r["step"], r["eval/accuracy"]) for r in run.metrics.rows() if r.get("eval/accuracy") is not None]
    summary = {
        "algorithm": c.algorithm.name,
        "seed": c.seed,
        "step": progress.step,
        "finished": progress.step >= c.steps,
        "rollouts_total": progress.rollouts_total,
        "tokens_generated_total": progress.tokens_generated_total,
        "eval/accuracy/first": scores[0][1],
        "eval/accuracy/last_two": float(np.mean([s for _, s in scores[-2:]])),
        "eval/accuracy/best": max(s for _, s in scores),
        "seconds": seconds,
        "code": run_dir.code_version(),
        "device": jax.devices()[0].device_kind,
    }
    (run.path / "summary.json").write_text(json.dumps(summary, indent=2))
    console.summary(summary, run.path)
    return summary


def _check_shown(groups: Iterable[Group], shown: Shown | None, where: str) -> None:
    """Errors: UserError if the data lacks a problem whose stored group would be shown its picture again."""
    stored = dict.fromkeys((g.task, g.prompt_id) for g in groups if shown is not None or g.task in PICTURED)
    lacking = [x for x in stored if shown is None or x not in shown.gallery]
    if lacking:
        task, id_ = lacking[0]
        raise UserError(
            f"{where} stores groups of {len(stored)} problems that are shown again: the data must have all of these, "
            f"got {len(stored) - len(lacking)}, not {id_} of task {task}"
        )


def _rewound(run: RunDir, step: int, c: Config, prints: dict[str, str]) -> None:
    _check_rows(run, step)
    run.rewind(step)
    run_dir.write_config(run, c, prints)


def _check_rows(run: RunDir, step: int) -> None:
    """Errors: UserError if metrics.jsonl lacks a row up to `step`."""
    lacking = set(range(step + 1)) - {r["step"] for r in run.metrics.rows()}
    if lacking:
        raise UserError(f"{run.metrics.path} must hold the rows 0 to {step} of the checkpoint's run, got none of {min(lacking)}")


def _checkpoints(c: Config, run: RunDir) -> Checkpoints:
    return Checkpoints(run.path / "checkpoints", keep_last=c.checkpoint.keep_last, keep_best=c.checkpoint.keep_best)


def _fingerprints(policy: Policy, sources: problems.Problems, grade: GradeFn) -> dict[str, str]:
    prints = problems.fingerprints(sources, grade)
    return prints | {"tokenizer": policy.tokenizer.fingerprint(), "code": run_dir.code_version()}


def _selection(c: Config) -> Mopps | None:
    return Mopps(c.selection, seed=c.seed) if c.selection.method == "mopps" else None


def _evaluator(
    c: Config, built: Built, policy: Policy, sources: problems.Problems, grade: GradeFn, clock: Clock, journal: Journal
) -> Callable[[Params, int], dict[str, float]]:
    prompts = evaluate.held_out(sources.held_out, c.eval.problems)
    sampler = built.sampler(samples=c.eval.samples, temperature=c.eval.temperature, top_p=c.eval.top_p)

    scenes = None if sources.shown is None else sources.shown.scenes(prompts)

    def asked(params: Params, step: int, scenes: Sequence[Scene] | None) -> evaluate.Answers:
        how: dict[str, Any] = {"seed": c.seed, "version": step, "scenes": scenes}
        return evaluate.answer(params, prompts, sampler, policy.tokenizer.decode, grade, **how)

    def score(params: Params, step: int) -> dict[str, float]:
        jax.block_until_ready(params)
        with clock("eval"):
            found = asked(params, step, scenes)
            journal.evaluation(step, found)
            seen = evaluate.accuracy(found)
            if scenes is None or not c.images.blind_eval:
                return seen
            blinded = evaluate.accuracy(asked(params, step, [blind(s) for s in scenes]))
            return seen | {"eval/blind/accuracy": blinded["eval/accuracy"]}

    return score


def _reference(
    c: Config, built: Built, folder: epath.Path | None, sources: problems.Problems
) -> Callable[[list[Group]], list[Group]] | None:
    """Scores fresh groups under the policy the run started from, kept outside the train state."""
    if not c.loss.kl_coef or folder is None:
        return None
    params = built.load(folder, key_for(c.seed, Purpose.INIT, 0))
    return reference_scorer(
        lambda *rows: built.score(params, *place(rows, built.mesh, BATCH)),
        c.row_tokens,
        c.batch.prompts * c.batch.group_size,
        None if sources.shown is None else sources.shown.rows,
    )
