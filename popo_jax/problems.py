"""Where tasks meet data: the problems a config names, as sources of prompts, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from popo_jax.config import Config
from popo_jax.data import chat as chats
from popo_jax.data.chat import Chat
from popo_jax.data.pictures import Eyes, Gallery, Shown
from popo_jax.data.stream import Source
from popo_jax.data.tokenizer import Tokenizer
from popo_jax.model_config import ModelConfig
from popo_jax.scenes import Sizes
from popo_jax.task_config import TaskConfig
from popo_jax.tasks import geometry, get_task, mathematics
from popo_jax.tasks.pool import Job
from popo_jax.types import UserError, Verdict

UNDIVIDED = {"math": mathematics.load_all, "geometry": geometry.load_all}
GradeFn = Callable[[Sequence[Job]], list[Verdict]]


@dataclass(frozen=True, eq=False)
class Problems:
    train: tuple[Source, ...]
    held_out: tuple[Source, ...]
    shown: Shown | None = None


def load(c: Config, tokenizer: Tokenizer, model: ModelConfig | None = None) -> Problems:
    """Training and held-out sources of every task, for a policy of shape `model` (None: that reads text alone).

    Errors: UserError for bad files, prompts over the limit, chat settings, pictures for a policy that does not see.
    """
    chat = _chat(c, tokenizer, model)
    train: list[Source] = []
    held_out: list[Source] = []
    sizes: list[Sizes] = []
    for i, config in enumerate(c.tasks):
        task = get_task(config.name)
        for problems, out, file in zip(task.load(config), (train, held_out), ("train_file", "eval_file"), strict=True):
            where = getattr(config, file) or _origin(config) or f"tasks.{i} ({config.name}, generated)"
            source, needed = _source(config, problems, where, c, chat)
            out.append(source)
            sizes += [needed] if needed else []
    return Problems(tuple(train), tuple(held_out), _shown((*train, *held_out), sizes, c, chat))


def load_all(config: TaskConfig, c: Config, tokenizer: Tokenizer, model: ModelConfig | None = None) -> Problems:
    """Every problem of a file or data set of a task that takes them (`UNDIVIDED`), as held out. Errors: UserError, as `load`."""
    chat = _chat(c, tokenizer, model)
    source, needed = _source(config, UNDIVIDED[config.name](config), _origin(config) or config.name, c, chat)
    return Problems((), (source,), _shown((source,), [needed] if needed else [], c, chat))


def with_sizes(c: Config, problems: Problems) -> Config:
    """With `images.max_tokens` and `max_windows` as the data needs them, where they are not given."""
    if problems.shown is None:
        return c
    s = problems.shown.sizes
    return replace(c, images=replace(c.images, max_tokens=s.tokens, max_windows=s.windows))


def _chat(c: Config, tokenizer: Tokenizer, model: ModelConfig | None) -> Chat:
    return chats.open_chat(c.chat, tokenizer, model.vision if model is not None and model.sees else None)


def _source(
    config: TaskConfig, problems: Sequence[Mapping[str, Any]], where: str, c: Config, chat: Chat
) -> tuple[Source, Sizes | None]:
    """Checked: every prompt fits; and the most that one shows."""
    task = get_task(config.name)
    pictures, eyes = getattr(task, "pictures", None), None
    if pictures is not None:
        if chat.vision is None:
            raise UserError(f"task {config.name} has pictures: the policy must be of family qwen2_5_vl, got one of text alone")
        eyes = Eyes(chat.vision, pictures, getattr(task, "picture_sizes", None))
    for name in config.slices:
        if not any(name in p for p in problems):
            raise UserError(f"{where} must have a column {name} (slices of task {config.name}), got {', '.join(problems[0])}")
    how = (task.prompt_text, task.problem_id, task.answer_fields, chat, eyes)
    source = Source(config.name, config.weight, problems, *how, config.slices)
    return source, source.check(c.sample.max_prompt_tokens, where)


def _shown(sources: Sequence[Source], sizes: Sequence[Sizes], c: Config, chat: Chat) -> Shown | None:
    """None: no task has pictures. Errors: UserError if a prompt shows more than `images` allows."""
    if not sizes or chat.vision is None:
        return None
    needed = {"max_windows": max(s.windows for s in sizes), "max_tokens": max(s.tokens for s in sizes)}
    most = {k: n if (given := getattr(c.images, k)) is None else given for k, n in needed.items()}
    for key, n in needed.items():
        if most[key] < n:
            raise UserError(f"images.{key} must be at least the {n} of a problem, got {most[key]} (smaller: images.max_pixels)")
    return Shown(Gallery(sources, c.images.cache_mb), Sizes(most["max_windows"], most["max_tokens"]), chat.vision)


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
