"""What a verifier may answer, and how its mistakes become verdicts. Shared by this process and the workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from popo_jax.types import Verdict

MAX_REASON = 300
"""Characters of an error's text in a reason."""


def judge(grade: Callable[..., Any], response: str, fields: Mapping[str, Any]) -> Verdict:
    """The verdict of `grade`, checked; NaN with the reason if it raises: the group becomes invalid, the others go on."""
    try:
        return check_verdict(grade(response, **fields))
    except Exception as e:
        return raised(e)


def check_verdict(verdict: object) -> Verdict:
    """The verdict with plain floats, or a NaN verdict that says what is wrong with it."""
    if not isinstance(verdict, Verdict):
        return broken(f"expected a Verdict, got {type(verdict).__name__}")
    for name, value in (("score", verdict.score), ("correct", verdict.correct)):
        if not isinstance(value, Real):
            return broken(f"{name} must be a number, got {type(value).__name__}")
        if not math.isfinite(value):
            return broken(f"{name} must be finite, got {float(value)}")
    if not 0 <= verdict.correct <= 1:
        return broken(f"correct must lie in [0, 1], got {float(verdict.correct)}")
    if not isinstance(verdict.reason, str):
        return broken(f"reason must be text, got {type(verdict.reason).__name__}")
    return Verdict(float(verdict.score), float(verdict.correct), verdict.reason)


def as_verdict(answer: object) -> object:
    """What a user's verifier answered, as a Verdict where it is short for one; anything else as it is, to be refused.

    A number or bool x in [0, 1] stands for score x and correct x, a pair (score, correct) for these two.
    The reason is then "right" (correct 1), "wrong" (0), or "partly right".
    """
    if isinstance(answer, Real):
        answer = (answer, answer)
    if not (isinstance(answer, tuple) and len(answer) == 2):
        return answer
    score, correct = answer
    reason = "partly right"
    if isinstance(correct, Real) and correct in (0, 1):
        reason = "right" if correct == 1 else "wrong"
    return Verdict(score, correct, reason)


def raised(e: Exception) -> Verdict:
    return broken(f"{type(e).__name__}: {message(e)}")


def broken(what: str) -> Verdict:
    return Verdict(math.nan, math.nan, f"verifier error: {what}")


def message(e: BaseException) -> str:
    """The exception's message: short, and free of lone surrogates, which no file takes."""
    try:
        return clean(str(e))
    except Exception:  # a message that raises is no reason to lose the others
        return "(its message cannot be read)"


def clean(text: str) -> str:
    return text[:MAX_REASON].encode(errors="backslashreplace").decode()
