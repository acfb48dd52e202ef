"""Verifiers over one step's responses: a teacher's answers, and hostile text, whose time must be bounded."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.suite.measure import Timed, rounds
from benchmarks.suite.report import Line, line
from benchmarks.suite.sizes import Size
from popo_jax.config import Config
from popo_jax.task_config import PoolConfig, TaskConfig
from popo_jax.tasks import TASKS, Task
from popo_jax.tasks.graders import Graders
from popo_jax.tasks.pool import Job
from popo_jax.types import UserError

HOSTILE = ("9**9**9**9", "(" * 100_000, "1+" * 50_000 + "1", "<answer>" * 10_000, "\u0663\u00b2" * 1000, "9" * 100_000)
"""Towers of powers, deep brackets, long sums, open tags, digits beyond ASCII, a long number."""
WORKED = 4096
"""Answers with their working: enough for what a call costs not to count."""


def run(size: Size) -> Iterator[Line]:
    """Every task that makes its own problems: answers of a teacher that is right in 60 %, and hostile ones."""
    for name in TASKS:
        problems = own_problems(name)
        if problems is None:
            continue
        jobs = {"": answers(name, problems, size.train.rows), "_hostile": hostile(name, problems)}
        if name == "math":
            jobs["_worked"] = worked(WORKED)
        c = Config(tasks=(TaskConfig(name=name),), verifier=PoolConfig(seconds=1.0))  # type: ignore[arg-type]
        with Graders(c) as grade:
            for kind, todo in jobs.items():
                yield timed(f"verifiers/{name}{kind}", todo, grade, size)


def timed(name: str, todo: Sequence[Job], grade: Graders, size: Size) -> Line:
    got = rounds({"grade": Timed(lambda: grade(todo))}, seconds=size.seconds / 4)
    seconds = got.seconds["grade"]
    each = statistics.median(seconds) / len(todo)
    right = sum(v.correct > 0.5 for v in grade(todo))
    extra = {"responses": len(todo), "right": right, "seconds_each": each, "a_minute": 60 / each}
    return line(name, size.name, seconds, others=got.others, **extra)  # type: ignore[arg-type]


def worked(n: int) -> list[Job]:
    """Answers like GSM8K's, no two alike: some sentences of working, then the number, boxed or after "####"; half are right."""
    jobs = []
    for i in range(n):
        a, b = 12 + i % 89, 3 + i // 89
        total = a * b + (i % 4 // 2)
        steps = f"Each of the {a} shelves holds {b} books, so there are {a} * {b} = {a * b} books in the room.\n"
        end = f"The answer is \\boxed{{{total}}}." if i % 2 else f"#### {total}"
        jobs.append(("math", steps + "Nothing is taken away, and none is added to them later.\n" + end, {"answer": str(a * b)}))
    return jobs


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
