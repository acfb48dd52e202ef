"""Held-out evaluation: inside a run at step 0 and every N steps, and as `popo eval RUN`. Never touches the buffer."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from popo_jax import restore
from popo_jax.data.stream import Source
from popo_jax.problems import GradeFn
from popo_jax.problems import load as load_problems
from popo_jax.rl.state import Purpose, key_for
from popo_jax.sampling.sampler import SampleFn
from popo_jax.tasks.graders import Graders
from popo_jax.types import Prompt, UserError, Verdict


@dataclass(frozen=True, eq=False)
class Answers:
    """Graded responses to N problems, k each."""

    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    """[N * k], problem by problem."""
    verdicts: tuple[Verdict, ...]
    correct: np.ndarray
    """float32 [N, k]."""


def held_out(sources: Sequence[Source], n: int) -> list[Prompt]:
    """The first n held-out problems, tasks in equal shares."""
    share = math.ceil(n / len(sources))
    return [s.prompt(p) for s in sources for p in s.problems[:share]][:n]


def answer(
    params: Any,
    prompts: Sequence[Prompt],
    sample: SampleFn,
    decode: Callable[[np.ndarray], str],
    grade: GradeFn,
    *,
    seed: int,
    version: int,
) -> Answers:
    """Sample and grade. The key is the same at every step, so evaluations differ by the policy only."""
    key = key_for(seed, Purpose.EVAL, 0)
    responses = sample(params, [p.tokens for p in prompts], key, version=version)
    k = len(responses.tokens) // len(prompts)
    texts = tuple(decode(row[mask]) for row, mask in zip(responses.tokens, responses.sampled_mask, strict=True))
    verdicts = tuple(grade([(prompts[i // k].task, t, prompts[i // k].answer) for i, t in enumerate(texts)]))
    correct = np.nan_to_num(np.array([v.correct for v in verdicts], np.float32)).reshape(len(prompts), k)
    return Answers(tuple(prompts), texts, verdicts, correct)


def accuracy(a: Answers) -> dict[str, float]:
    """`eval/accuracy` over all problems and `eval/<task>/accuracy`."""
    tasks = np.array([p.task for p in a.prompts])
    out = {"eval/accuracy": float(a.correct.mean())}
    return out | {f"eval/{t}/accuracy": float(a.correct[tasks == t].mean()) for t in sorted(set(tasks.tolist()))}


def pass_at(correct: np.ndarray, k: int) -> float:
    """Unbiased pass@k: mean over problems of 1 - C(n - c, k) / C(n, k), n samples of which c are right (Chen et al. 2021).

    correct: [N, n] in [0, 1], right where >= 1 - 1e-6. Errors: ValueError for k above n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@k needs k from 1 to the {n} samples per problem, got {k}")
    right = (correct >= 1 - 1e-6).sum(axis=1)
    return float(np.mean([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in right]))


def reasons(a: Answers) -> dict[str, int]:
    """How often each reason was given, most frequent first."""
    found, counts = np.unique([v.reason for v in a.verdicts], return_counts=True)
    return {str(found[i]): int(counts[i]) for i in np.argsort(-counts)}


def command(
    run: epath.PathLike, *, k: Sequence[int], temperature: float, top_p: float, problems: int | None, step: int | None, seed: int
) -> dict[str, float]:
    """`popo eval RUN`: greedy accuracy, avg@n and pass@k for each k with n = max(k); printed, and kept in RUN/eval/."""
    if not k or min(k) < 1:
        raise UserError(f"--k must list whole numbers of at least 1, got {list(k)}")
    if problems is not None and problems < 1:
        raise UserError(f"--problems must be at least 1, got {problems}")
    if not temperature > 0:
        raise UserError(f"--temperature must be above 0 (greedy is always reported besides), got {temperature}")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p must lie in (0, 1], got {top_p}")
    r = restore.restore(run, step)
    prompts = held_out(load_problems(r.c, r.policy.tokenizer).held_out, problems or r.c.eval.problems)
    n, decode = max(k), r.policy.tokenizer.decode
    greedy = r.built.sampler(samples=1, temperature=0.0)
    drawn = r.built.sampler(samples=n, temperature=temperature, top_p=top_p)
    with Graders(r.c) as grade:
        first = answer(r.state.params, prompts, greedy, decode, grade, seed=seed, version=r.step)
        many = answer(r.state.params, prompts, drawn, decode, grade, seed=seed, version=r.step)
    result = {"greedy": float(first.correct.mean()), f"avg@{n}": float(many.correct.mean())}
    result |= {f"pass@{i}": pass_at(many.correct, i) for i in sorted(set(k))}
    how = {"step": r.step, "problems": len(prompts), "samples": n, "temperature": temperature, "top_p": top_p, "seed": seed}
    _keep(epath.Path(run) / "eval", how, result, {"greedy": first, "sampled": many})
    _show(how, result, first)
    return result


def _keep(folder: epath.Path, how: dict[str, Any], result: dict[str, float], answers: dict[str, Answers]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{how['step']:06d}-k{how['samples']}-n{how['problems']}-t{how['temperature']}-p{how['top_p']}-s{how['seed']}"
    lines = [json.dumps({"kind": kind, **row}) for kind, a in answers.items() for row in rows(a)]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / f"{name}.json").write_text(json.dumps(how | result, indent=2))


def rows(a: Answers) -> list[dict[str, Any]]:
    """One record per response: task, prompt id, prompt, text, verdict."""
    k = a.correct.shape[1]
    return [
        {"task": p.task, "prompt_id": p.id, "prompt": p.text, "text": a.texts[i * k + j]}
        | dataclasses.asdict(a.verdicts[i * k + j])
        for i, p in enumerate(a.prompts)
        for j in range(k)
    ]


def _show(how: dict[str, Any], result: dict[str, float], greedy: Answers) -> None:
    table = Table(title=f"step {how['step']}, {how['problems']} held-out problems, temperature {how['temperature']}")
    for name in result:
        table.add_column(name, justify="right")
    table.add_row(*(f"{100 * v:.1f} %" for v in result.values()))
    console = Console()
    console.print(table)
    console.print("greedy verdicts: " + ", ".join(f"{n} {reason}" for reason, n in reasons(greedy).items()))
