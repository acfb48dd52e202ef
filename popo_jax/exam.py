"""`popo eval MODEL_OR_RUN`: the answers of a run, a checkpoint folder or a hub model to tasks and suites, kept as they come.

OUT/settings.json  answers.jsonl  greedy.jsonl  summary.json. The draws of a problem depend on the seed and its number in its task
alone, so an evaluation that was cut goes on where it was, and one of fewer rows at once gives the same answers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from etils import epath

import popo_jax.policy as policies
from popo_jax import answers, build, evaluate, problems, restore, run_dir
from popo_jax.answers import Sheet
from popo_jax.build import Built
from popo_jax.config import Config, from_dict
from popo_jax.data.pictures import Shown
from popo_jax.eval_args import CHAT, EvalArgs
from popo_jax.evaluate import Answers
from popo_jax.models import hub
from popo_jax.policy import Policy
from popo_jax.rl.state import Params, Purpose, key_for
from popo_jax.rules import resolve
from popo_jax.runtime.mesh import make_mesh
from popo_jax.sampling.sampler import Sampler
from popo_jax.scenes import Sizes
from popo_jax.task_config import TaskConfig
from popo_jax.tasks import suites
from popo_jax.tasks.graders import Graders
from popo_jax.types import Prompt, UserError

PROMPT_TOKENS, RESPONSE_TOKENS = 2048, 8192
"""Limits of a checkpoint, which has no run's."""
SAMPLED, GREEDY = "answers.jsonl", "greedy.jsonl"


@dataclass(frozen=True, eq=False)
class Subject:
    """Who is asked."""

    c: Config
    """Its limits and rows at once are the evaluation's."""
    policy: Policy
    built: Built
    params: Params
    version: int
    """Updates applied; 0 for a checkpoint."""
    run: epath.Path | None
    weights: str
    """Of a checkpoint, tells when its files change."""


@dataclass(frozen=True, eq=False)
class Exam:
    """What is asked under one name, and how it is graded."""

    name: str
    c: Config
    """Its only task is the one whose verifier grades."""
    prompts: tuple[Prompt, ...]
    shown: Shown | None = None
    """What they show, if the policy sees and the task has pictures."""


def command(a: EvalArgs) -> dict[str, dict[str, Any]]:
    """avg@k and pass@k of every task, printed and written. Errors: UserError."""
    subject = open_subject(a)
    exams = open_exams(a, subject)
    own = subject.run is not None and not a.task and a.data is None
    greedy = own if a.greedy is None else a.greedy
    settings = _settings(a, subject, exams, greedy)
    folder = answers.open_folder(a.out or _default_folder(a, subject, exams, settings), settings)
    print(f"Answers: {folder}", flush=True)
    sizes = _sizes(exams)
    samplers = {SAMPLED: subject.built.sampler(samples=a.samples, temperature=a.temperature, top_p=a.top_p, sizes=sizes)}
    if greedy:
        samplers = {GREEDY: subject.built.sampler(samples=1, temperature=0.0, sizes=sizes)} | samplers
    for file, sampler in samplers.items():
        _ask(subject, exams, sampler, Sheet(folder / file, sampler.c.samples), a.seed)
    found = answers.summary(answers.read(folder / SAMPLED), a.k or (a.samples,), str(folder / SAMPLED))
    best = answers.summary(answers.read(folder / GREEDY), (), str(folder / GREEDY)) if greedy else None
    answers.write_summary(folder, settings, found, greedy=best)
    at = f", step {subject.version}" if subject.run else ""
    if best:
        answers.show(best, f"{a.model}{at}, greedy")
    answers.show(found, f"{a.model}{at}, temperature {a.temperature}, top-p {a.top_p}")
    return found


def open_subject(a: EvalArgs) -> Subject:
    """Errors: UserError if `a.model` is neither a run, nor a checkpoint, nor on the hub."""
    name = str(a.model)
    if (epath.Path(name) / "config.yaml").exists():
        if a.of_checkpoint:
            raise UserError(f"--{next(iter(a.of_checkpoint))} goes with a checkpoint, {name} is a run: it has its own")
        r = restore.restore(name, a.step, lambda c: _limited(a, c))
        return Subject(r.c, r.policy, r.built, r.state.params, r.step, epath.Path(name), "")
    if a.step is not None:
        raise UserError(f"--step {a.step} goes with a run directory (a folder with config.yaml), got {name}")
    folder = hub.locate(name, "popo eval MODEL_OR_RUN")
    if not (folder / "config.json").exists():
        got = "another folder" if folder.exists() else "none"
        raise UserError(
            f"{name} must be a run directory (with config.yaml), a checkpoint (with config.json) or a hub id, got {got}"
        )
    limits = {"max_prompt_tokens": PROMPT_TOKENS, "max_response_tokens": RESPONSE_TOKENS}
    chat = {k: v for k, v in a.of_checkpoint.items() if k in CHAT}
    c = _limited(a, resolve(from_dict({"policy": {"path": str(folder)}, "sample": limits, "chat": chat}, "popo eval")))
    mesh = make_mesh(c)
    dtype = a.dtype or ("float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16")
    c = replace(c, model=replace(c.model, dtype=dtype, param_dtype=dtype))
    policy = policies.describe(folder, c)
    for sentence in policies.lacks(policy, c):
        print(sentence)
    built = build.build(c, policy.model, eos_ids=policy.tokenizer.eos_ids, mesh=mesh)
    params = built.load(folder, key_for(c.seed, Purpose.INIT, 0))
    files = sorted(folder.glob("*.safetensors"))
    return Subject(c, policy, built, params, 0, None, _digest([(f.name, f.stat().length, f.stat().mtime) for f in files]))


def _limited(a: EvalArgs, c: Config) -> Config:
    s = c.sample
    return replace(
        c,
        sample=replace(
            s,
            max_prompt_tokens=a.max_prompt_tokens or s.max_prompt_tokens,
            max_response_tokens=a.max_response_tokens or s.max_response_tokens,
            max_rows=a.rows or s.max_rows or c.batch.prompts * c.batch.group_size,
        ),
    )


def open_exams(a: EvalArgs, subject: Subject) -> list[Exam]:
    """The tasks and suites named, else those of the run. Errors: UserError for an unknown name, or what cannot be loaded."""
    names = list(dict.fromkeys(n.lower() for n in a.task)) or (["math"] if a.data is not None else [])
    if not names and subject.run is not None:
        names = [t.name for t in subject.c.tasks]
    if not names:
        raise UserError(f"--task must name a task or a suite: {a.model} is no run, which has its own; got none")
    known = [(n, suites.find(n)) for n in names]
    return [_exam(n, suite, a, subject) for n, suite in known]


def _exam(name: str, suite: suites.Suite | None, a: EvalArgs, subject: Subject) -> Exam:
    tokenizer, data = subject.policy.tokenizer, None if a.data is None else str(a.data)
    c = replace(subject.c, images=replace(subject.c.images, max_tokens=None, max_windows=None))  # as this data needs them
    task = name if suite is None else "math"
    base = next((t for t in c.tasks if t.name == task), None) if subject.run is not None else None
    n = a.problems
    if suite is not None or (name == "math" and data is not None):
        columns = {"problem": a.problem_column, "answer": a.answer_column}
        config = suites.config(base or TaskConfig("math"), suite, data, **columns)
        found = problems.load_all(config, c, tokenizer, subject.policy.model)
    elif name == "geometry" and data is not None:
        config = base or TaskConfig("geometry")
        config = replace(config, train_file=data, eval_file=None, geometry=replace(config.geometry, dataset=None))
        found = problems.load_all(config, c, tokenizer, subject.policy.model)
    else:
        if a.problem_column or a.answer_column:
            raise UserError(f"--problem-column and --answer-column go with a suite, or math and --data, got task {name}")
        config = replace(base or TaskConfig(name), **({} if data is None else {"eval_file": data}))  # type: ignore[arg-type]
        found = problems.load(replace(c, tasks=(config,)), tokenizer, subject.policy.model)
        if n is None and base is not None and data is None:
            n = math.ceil(c.eval.problems / len(c.tasks))
    source = found.held_out[0]
    prompts = evaluate.held_out([source], len(source.problems) if n is None else n)
    return Exam(name if suite is None else suite.name, replace(c, tasks=(config,)), tuple(prompts), found.shown)


def _sizes(exams: Sequence[Exam]) -> Sizes | None:
    """The most that a prompt of any exam shows; None: none shows anything."""
    found = [e.shown.sizes for e in exams if e.shown is not None]
    return Sizes(max(s.windows for s in found), max(s.tokens for s in found)) if found else None


def _ask(subject: Subject, exams: Sequence[Exam], sample: Sampler, sheet: Sheet, seed: int) -> None:
    """Answers to all exams onto `sheet`, but for those that are on it, as many problems at once as the sampler has rows for."""
    done, at_once = sheet.whole(), max((sample.c.max_rows or 1) // sample.c.samples, 1)
    for exam in exams:
        todo = exam.prompts[done:]
        begun, done = len(exam.prompts) - len(todo), max(done - len(exam.prompts), 0)
        if not todo:
            continue
        with Graders(exam.c) as grade:
            for i in range(0, len(todo), at_once):
                asked = todo[i : i + at_once]
                got = evaluate.answer(
                    subject.params,
                    asked,
                    sample,
                    subject.policy.tokenizer.decode,
                    grade,
                    seed=seed,
                    version=subject.version,
                    first=begun + i,
                    scenes=None if exam.shown is None else exam.shown.scenes(asked),
                )
                sheet.append(rows(exam.name, got))
                print(f"{exam.name}: {begun + i + len(got.prompts)} of {len(exam.prompts)} problems", flush=True)


def rows(name: str, a: Answers) -> list[dict[str, Any]]:
    """A record for every response, problem by problem."""
    k, out = a.correct.shape[1], []
    for i, v in enumerate(a.verdicts):
        p = a.prompts[i // k]
        row = {"task": name, "problem": p.id, "sample": i % k, "prompt": p.text, "text": a.texts[i], "answer": _gold(p)}
        how = {"tokens": int(a.lengths[i]), "truncated": not a.ended[i], "version": a.version}
        out.append(row | {"score": v.score, "correct": v.correct, "reason": v.reason} | how)
    return out


def _gold(p: Prompt) -> Any:
    return p.answer["answer"] if set(p.answer) == {"answer"} else dict(p.answer)


def _settings(a: EvalArgs, subject: Subject, exams: Sequence[Exam], greedy: bool) -> dict[str, Any]:
    """What decides the answers."""
    s = subject.c.sample
    asked = {
        e.name: {"problems": len(e.prompts), "prompts": _digest([(p.id, p.tokens.tolist()) for p in e.prompts])} for e in exams
    }
    return {
        "model": str(a.model),
        "step": subject.version if subject.run is not None else None,
        "weights": subject.weights,
        "tokenizer": subject.policy.tokenizer.fingerprint(),
        "tasks": asked,
        "samples": a.samples,
        "temperature": a.temperature,
        "top_p": a.top_p,
        "greedy": greedy,
        "max_response_tokens": s.max_response_tokens,
        "dtype": subject.policy.model.dtype,
        "seed": a.seed,
        "code": run_dir.code_version(),
    }


def _default_folder(a: EvalArgs, subject: Subject, exams: Sequence[Exam], settings: dict[str, Any]) -> epath.Path:
    """A name for each choice of settings: the same evaluation, asked for again, goes on in its folder."""
    what = f"{'+'.join(e.name for e in exams)}-k{a.samples}-{_digest(settings)[:6]}"
    if subject.run is not None:
        return subject.run / "eval" / f"{subject.version:06d}-{what}"
    return epath.Path(f"eval-{str(a.model).rstrip('/').rpartition('/')[2]}-{what}")


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
