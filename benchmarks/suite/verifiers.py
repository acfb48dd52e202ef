"""Verifiers over one step's responses: a teacher's answers, and hostile text, whose time must be bounded."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.suite.measure import Timed, rounds
from benchmarks.suite.report import Line, line
from benchmarks.suite.sizes import Size
from popo_jax.config import TaskConfig
from popo_jax.tasks import TASKS, Task
from popo_jax.tasks.pool import Job, grade_all
from popo_jax.types import UserError

HOSTILE = ("9**9**9**9", "(" * 100_000, "1+" * 50_000 + "1", "<answer>" * 10_000, "\u0663\u00b2" * 1000, "9" * 100_000)
"""Towers of powers, deep brackets, long sums, open tags, digits beyond ASCII, a long number."""


def run(size: Size) -> Iterator[Line]:
    """Every task that makes its own problems: answers of a teacher that is right in 60 %, and hostile ones."""
    for name in TASKS:
        problems = own_problems(name)
        if problems is None:
            continue
        jobs = {"": answers(name, problems, size.train.rows), "_hostile": hostile(name, problems)}
        for kind, todo in jobs.items():
            got = rounds({"grade": Timed(lambda todo=todo: grade_all(todo))}, seconds=size.seconds / 4)  # type: ignore[misc]
            seconds = got.seconds["grade"]
            extra = {"responses": len(todo), "right": sum(v.correct > 0.5 for v in grade_all(todo))}
            extra["seconds_each"] = statistics.median(seconds) / len(todo)
            yield line(f"verifiers/{name}{kind}", size.name, seconds, others=got.others, **extra)


def own_problems(name: str) -> Sequence[Mapping[str, Any]] | None:
    """Training problems of a task's defaults; None if it must be given files."""
    try:
        return TASKS[name].load(TaskConfig(name=name))[0]  # type: ignore[arg-type]
    except UserError:
        return None


def answers(name: str, problems: Sequence[Mapping[str, Any]], n: int) -> list[Job]:
    task: Task = TASKS[name]
    rng = np.random.default_rng(0)
    asked = [problems[i % len(problems)] for i in range(n)]
    return [(name, task.teacher_answer(p, rng, right=0.6), task.answer_fields(p)) for p in asked]


def hostile(name: str, problems: Sequence[Mapping[str, Any]]) -> list[Job]:
    return [(name, text, TASKS[name].answer_fields(problems[0])) for text in HOSTILE]
