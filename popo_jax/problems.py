"""Where tasks meet data: the problems a config names, as sources of prompts, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from popo_jax.config import Config
from popo_jax.data import chat as chats
from popo_jax.data.chat import Chat
from popo_jax.data.stream import Source
from popo_jax.data.tokenizer import Tokenizer
from popo_jax.task_config import TaskConfig
from popo_jax.tasks import get_task, mathematics
from popo_jax.tasks.pool import Job
from popo_jax.types import Verdict

GradeFn = Callable[[Sequence[Job]], list[Verdict]]


@dataclass(frozen=True, eq=False)
class Problems:
    train: tuple[Source, ...]
    held_out: tuple[Source, ...]


def load(c: Config, tokenizer: Tokenizer) -> Problems:
    """Training and held-out sources of every task. Errors: UserError for bad files, prompts over the limit, chat settings."""
    chat = chats.open_chat(c.chat, tokenizer)
    train: list[Source] = []
    held_out: list[Source] = []
    for i, config in enumerate(c.tasks):
        task = get_task(config.name)
        for problems, out, file in zip(task.load(config), (train, held_out), ("train_file", "eval_file"), strict=True):
            where = getattr(config, file) or _origin(config) or f"tasks.{i} ({config.name}, generated)"
            out.append(_source(config, problems, where, c, chat))
    return Problems(tuple(train), tuple(held_out))


def load_all(config: TaskConfig, c: Config, tokenizer: Tokenizer) -> Source:
    """Every problem of a mathematics file or data set, undivided. Errors: UserError, as `load`."""
    chat = chats.open_chat(c.chat, tokenizer)
    return _source(config, mathematics.load_all(config), _origin(config) or config.name, c, chat)


def _source(config: TaskConfig, problems: Sequence[Mapping[str, Any]], where: str, c: Config, chat: Chat) -> Source:
    """Checked: every prompt fits."""
    task = get_task(config.name)
    source = Source(config.name, config.weight, problems, task.prompt_text, task.problem_id, task.answer_fields, chat)
    source.check(c.sample.max_prompt_tokens, where)
    return source


def _origin(config: TaskConfig) -> str | None:
    """Where both sides come from, if one source is divided between them."""
    given = {"math": config.math.dataset, "geometry": config.geometry.dataset}
    return (config.train_file or given[config.name]) if config.name in given else None


def fingerprints(problems: Problems, grade: GradeFn) -> dict[str, str]:
    """Hashes that change with the data, the prompt template, or the reward, each 16 hex digits."""
    jobs = [job for s, p in _sample(problems) for job in _jobs(s, p)]
    verdicts = [(v.score, v.correct, v.reason) for v in grade(jobs)]
    each = len(jobs) // max(len(_sample(problems)), 1)
    return asked(problems) | {"reward": _digest([verdicts[i : i + each] for i in range(0, len(verdicts), each)])}


def asked(problems: Problems) -> dict[str, str]:
    """The fingerprints that do not grade: of the data and the prompt template."""
    data = [[s.id(p) for p in s.problems] for s in (*problems.train, *problems.held_out)]
    return {"data": _digest(data), "template": _digest([s.text(p) for s, p in _sample(problems)])}


def _sample(problems: Problems) -> list[tuple[Source, Mapping[str, Any]]]:
    return [(s, p) for s in problems.held_out for p in s.problems[:16]]


def _jobs(source: Source, problem: Mapping[str, Any]) -> list[Job]:
    """A teacher's right and wrong answer, if the task has a teacher, and nonsense."""
    teacher, rng = getattr(get_task(source.task), "teacher_answer", None), np.random.default_rng(0)
    answers = [teacher(problem, rng, right=right) if teacher else "" for right in (0.0, 1.0)] + ["", "?"]
    return [(source.task, a, source.answer(problem)) for a in answers]


def _digest(data: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
