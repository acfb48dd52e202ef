"""One file per domain: its data, its prompt, its verifier. A task is a module with the attributes of `Task`.

Nothing here imports jax: verifier workers start in milliseconds and claim no device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from popo_jax.task_config import TaskConfig
from popo_jax.tasks import arithmetic, countdown, geometry, mathematics
from popo_jax.types import UserError, Verdict

Problem = Mapping[str, Any]


class Task(Protocol):
    """What the rest of the program asks of a domain."""

    grade: Callable[..., Verdict]
    """(response, **answer_fields). Never raises on any text."""

    def load(self, config: TaskConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Training and held-out problems, sharing none. Errors: UserError."""

    def prompt_text(self, problem: Problem) -> str:
        """What the policy reads, before any chat template."""

    def problem_id(self, problem: Problem) -> str:
        """Stable across runs and processes: made from the content."""

    def answer_fields(self, problem: Problem) -> dict[str, Any]:
        """Keyword fields of `grade`."""

    def teacher_answer(self, problem: Problem, rng: np.random.Generator, *, right: float) -> str:
        """An answer for the warm start: right with probability `right`, else well-formed and wrong."""


TASKS: Mapping[str, Task] = {"countdown": countdown, "arithmetic": arithmetic, "math": mathematics, "geometry": geometry}


def get_task(name: str) -> Task:
    """The task of that name. Errors: UserError for an unknown one."""
    if name not in TASKS:
        raise UserError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]
