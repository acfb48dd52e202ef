"""Runs verifiers over the responses of a step. Whatever a verifier does, every response gets a verdict.

Verifiers bounded by construction run in this process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from popo_jax.tasks import get_task
from popo_jax.types import Verdict

Job = tuple[str, str, Mapping[str, Any]]
"""Task name, response text, keyword fields of the task's `grade`."""

MAX_REASON = 300
"""Characters of an error's text in a reason."""


def grade_all(jobs: Sequence[Job]) -> list[Verdict]:
    """Verdicts of all jobs, in order. A verifier that raises, or answers nonsense, gives NaN and the reason.

    Errors: UserError for an unknown task.
    """
    graders = {name: get_task(name).grade for name in {task for task, _, _ in jobs}}
    return [_grade(graders[task], response, fields) for task, response, fields in jobs]


def _grade(grade: Any, response: str, fields: Mapping[str, Any]) -> Verdict:
    try:
        return check_verdict(grade(response, **fields))
    except Exception as e:  # a bug of the verifier: the group becomes invalid, the others go on
        return _broken(f"{type(e).__name__}: {_text(e)}")


def check_verdict(verdict: object) -> Verdict:
    """The verdict with plain floats, or a NaN verdict that says what is wrong with it."""
    if not isinstance(verdict, Verdict):
        return _broken(f"expected a Verdict, got {type(verdict).__name__}")
    for name, value in (("score", verdict.score), ("correct", verdict.correct)):
        if not isinstance(value, Real):
            return _broken(f"{name} must be a number, got {type(value).__name__}")
        if not math.isfinite(value):
            return _broken(f"{name} must be finite, got {float(value)}")
    if not 0 <= verdict.correct <= 1:
        return _broken(f"correct must lie in [0, 1], got {float(verdict.correct)}")
    if not isinstance(verdict.reason, str):
        return _broken(f"reason must be text, got {type(verdict.reason).__name__}")
    return Verdict(float(verdict.score), float(verdict.correct), verdict.reason)


def _broken(what: str) -> Verdict:
    return Verdict(math.nan, math.nan, f"verifier error: {what}")


def _text(e: Exception) -> str:
    """The exception's message: short, and free of lone surrogates, which no file takes."""
    try:
        return str(e)[:MAX_REASON].encode(errors="backslashreplace").decode()
    except Exception:  # a message that raises is no reason to lose the others
        return "(its message cannot be read)"
