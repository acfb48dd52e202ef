"""Where tasks meet data: the problems a config names, as sources of prompts, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from popo_jax.config import Config
from popo_jax.data.stream import Source
from popo_jax.data.tokenizer import Tokenizer
from popo_jax.tasks import get_task
from popo_jax.tasks.pool import grade_all


@dataclass(frozen=True, eq=False)
class Problems:
    train: tuple[Source, ...]
    held_out: tuple[Source, ...]


def load(c: Config, tokenizer: Tokenizer) -> Problems:
    """Training and held-out sources of every task. Errors: UserError for bad files, prompts over the limit."""
    train: list[Source] = []
    held_out: list[Source] = []
    for i, config in enumerate(c.tasks):
        task = get_task(config.name)
        for problems, out, file in zip(task.load(config), (train, held_out), ("train_file", "eval_file"), strict=True):
            where = getattr(config, file) or f"tasks.{i} ({config.name}, generated)"
            source = Source(
                config.name, config.weight, problems, task.prompt_text, task.problem_id, task.answer_fields, tokenizer
            )
            source.check(c.sample.max_prompt_tokens, where)
            out.append(source)
    return Problems(tuple(train), tuple(held_out))


def fingerprints(problems: Problems) -> dict[str, str]:
    """Hashes that change with the data, the prompt template, or the reward, each 16 hex digits."""
    data = [[s.id(p) for p in s.problems] for s in (*problems.train, *problems.held_out)]
    sample = [(s, p) for s in problems.held_out for p in s.problems[:16]]
    template = [s.text(p) for s, p in sample]
    return {"data": _digest(data), "template": _digest(template), "reward": _digest([_verdicts(s, p) for s, p in sample])}


def _verdicts(source: Source, problem: Mapping[str, Any]) -> list[tuple[float, float, str]]:
    """What the verifier says of a teacher's right and wrong answers, and of nonsense."""
    task, rng = get_task(source.task), np.random.default_rng(0)
    answers = [task.teacher_answer(problem, rng, right=right) for right in (0.0, 1.0)] + ["", "?"]
    verdicts = grade_all([(source.task, a, source.answer(problem)) for a in answers])
    return [(v.score, v.correct, v.reason) for v in verdicts]


def _digest(data: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
