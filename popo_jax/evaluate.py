"""Held-out evaluation: inside a run at step 0 and every N steps, and for `popo eval` (exam.py). Never touches the buffer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from popo_jax.data.stream import Source
from popo_jax.problems import GradeFn
from popo_jax.rl.state import Purpose, key_for
from popo_jax.sampling.sampler import SampleFn
from popo_jax.scenes import Scene
from popo_jax.types import Prompt, Verdict


@dataclass(frozen=True, eq=False)
class Answers:
    """Graded responses to N problems, k each."""

    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    """[N * k], problem by problem."""
    verdicts: tuple[Verdict, ...]
    correct: np.ndarray
    """float32 [N, k]; 0 where the verifier failed."""
    lengths: np.ndarray
    """int32 [N * k]: tokens sampled, the end token included."""
    ended: np.ndarray
    """bool [N * k]; False: cut by the limit."""
    version: int


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
    first: int = 0,
    scenes: Sequence[Scene] | None = None,
) -> Answers:
    """Sample and grade. The key is the same at every step, so evaluations differ by the policy only.

    `first` is the number of the first prompt among those of the evaluation: parts of it draw what the whole would. `scenes`: what
    the prompts show, for a policy that sees.
    """
    key = key_for(seed, Purpose.EVAL, 0)
    seen: dict[str, Any] = {} if scenes is None else {"scenes": scenes}
    responses = sample(params, [p.tokens for p in prompts], key, version=version, first=first, **seen)
    k = len(responses.tokens) // len(prompts)
    texts = tuple(decode(row[mask]) for row, mask in zip(responses.tokens, responses.sampled_mask, strict=True))
    of = [prompts[i // k] for i in range(len(texts))]
    verdicts = tuple(grade([(p.task, p.begun + t, p.answer) for p, t in zip(of, texts, strict=True)]))
    correct = np.nan_to_num(np.array([v.correct for v in verdicts], np.float32)).reshape(len(prompts), k)
    lengths = responses.sampled_mask.sum(axis=1, dtype=np.int32)
    return Answers(tuple(prompts), texts, verdicts, correct, lengths, responses.ended, version)


def accuracy(a: Answers) -> dict[str, float]:
    """`eval/accuracy` over all problems and `eval/<task>/accuracy`."""
    tasks = np.array([p.task for p in a.prompts])
    out = {"eval/accuracy": float(a.correct.mean())}
    return out | {f"eval/{t}/accuracy": float(a.correct[tasks == t].mean()) for t in sorted(set(tasks.tolist()))}
