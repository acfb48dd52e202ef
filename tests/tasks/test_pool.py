"""Grading of many responses, verifiers that break, the registry, and what importing this room costs."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from popo_jax import tasks
from popo_jax.tasks.pool import Job, check_verdict, grade_all
from popo_jax.types import UserError, Verdict

FIELDS = {"nums": (3, 5, 7), "target": 56}


def with_verifier(monkeypatch: pytest.MonkeyPatch, grade: Callable[..., Any]) -> None:
    monkeypatch.setattr(tasks, "TASKS", {**tasks.TASKS, "custom": SimpleNamespace(grade=grade)})


def is_broken(v: Verdict, *words: str) -> bool:
    nan = math.isnan(v.score) and math.isnan(v.correct)
    return nan and v.reason.startswith("verifier error: ") and all(w in v.reason for w in words)


def test_verdicts_come_in_order() -> None:
    texts = ["(3+5)*7", "3+5+7", "3+5", "", "3**5"]
    verdicts = grade_all([("countdown", t, FIELDS) for t in texts])
    assert [v.reason for v in verdicts] == ["right", "wrong value", "wrong numbers", "no answer", "malformed"]
    assert [v.score for v in verdicts] == [1.0, 0.1, 0.1, 0.0, 0.0]
    assert grade_all([]) == []


def test_a_verifier_that_raises_spoils_its_own_response_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def grade(response: str, *, bad: type[Exception]) -> Verdict:
        if response == "x":
            raise bad("no\ud800 luck" + "!" * 10**6)
        return Verdict(1.0, 1.0, "right")

    with_verifier(monkeypatch, grade)
    for bad in (ValueError, ZeroDivisionError, RecursionError, MemoryError, KeyError, AssertionError):
        jobs: list[Job] = [("custom", "x", {"bad": bad}), ("custom", "y", {"bad": bad}), ("countdown", "(3+5)*7", FIELDS)]
        broken, fine, other = grade_all(jobs)
        assert is_broken(broken, f"{bad.__name__}: ", "no", "luck")
        assert len(broken.reason) < 400 and broken.reason.encode()  # short, and a file takes it
        assert fine == Verdict(1.0, 1.0, "right") and other.reason == "right"


def test_an_exception_whose_message_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rude(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def grade(response: str) -> Verdict:
        raise Rude

    with_verifier(monkeypatch, grade)
    (verdict,) = grade_all([("custom", "x", {})])
    assert is_broken(verdict, "Rude")


def test_wrong_fields_are_the_verifiers_error() -> None:
    (verdict,) = grade_all([("countdown", "(3+5)*7", {"numbers": [3]})])
    assert is_broken(verdict, "TypeError", "numbers")


def test_ctrl_c_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def grade(response: str) -> Verdict:
        raise KeyboardInterrupt

    with_verifier(monkeypatch, grade)
    with pytest.raises(KeyboardInterrupt):
        grade_all([("custom", "x", {})])


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (None, "expected a Verdict, got NoneType"),
        (1.0, "expected a Verdict, got float"),
        ((1.0, 1.0, "right"), "expected a Verdict, got tuple"),
        (Verdict(math.nan, 0.0, "r"), "score must be finite, got nan"),
        (Verdict(math.inf, 0.0, "r"), "score must be finite, got inf"),
        (Verdict(0.0, math.nan, "r"), "correct must be finite, got nan"),
        (Verdict(0.0, -math.inf, "r"), "correct must be finite, got -inf"),
        (Verdict(0.0, 1.1, "r"), "correct must lie in [0, 1], got 1.1"),
        (Verdict(0.0, -0.1, "r"), "correct must lie in [0, 1], got -0.1"),
        (Verdict(None, 0.0, "r"), "score must be a number, got NoneType"),  # type: ignore[arg-type]
        (Verdict("1", 0.0, "r"), "score must be a number, got str"),  # type: ignore[arg-type]
        (Verdict(0.0, 1j, "r"), "correct must be a number, got complex"),  # type: ignore[arg-type]
        (Verdict(np.ones(2), 0.0, "r"), "score must be a number, got ndarray"),  # type: ignore[arg-type]
        (Verdict(Decimal(1), 0.0, "r"), "score must be a number, got Decimal"),  # type: ignore[arg-type]
        (Verdict(1.0, 1.0, None), "reason must be text, got NoneType"),  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_nonsense_becomes_nan_with_a_reason(verdict: object, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_broken(check_verdict(verdict), words)
    with_verifier(monkeypatch, lambda response: verdict)
    assert is_broken(grade_all([("custom", "x", {})])[0], words)


def test_a_score_too_large_for_a_float(monkeypatch: pytest.MonkeyPatch) -> None:
    with_verifier(monkeypatch, lambda response: Verdict(10**400, 0.0, "r"))
    assert is_broken(grade_all([("custom", "x", {})])[0], "OverflowError")


@pytest.mark.parametrize(
    "verdict",
    [Verdict(-2.5, 0.5, "part"), Verdict(np.float32(1), np.float64(0.5), "r"), Verdict(1, True, "r")],  # type: ignore[arg-type]
    ids=str,
)
def test_sound_verdicts_pass_as_floats(verdict: Verdict) -> None:
    checked = check_verdict(verdict)
    assert checked == verdict and type(checked.score) is float and type(checked.correct) is float


def test_an_unknown_task_is_refused() -> None:
    for call in (lambda: tasks.get_task("countdwn"), lambda: grade_all([("countdwn", "x", {})])):
        with pytest.raises(UserError, match="task must be one of countdown, arithmetic, math, geometry, got 'countdwn'"):
            call()


def test_importing_the_room_loads_neither_jax_nor_pyarrow() -> None:
    code = (
        "import sys, popo_jax.tasks, popo_jax.tasks.countdown, popo_jax.tasks.pool, popo_jax.tasks.files; "
        "print([m for m in ('jax', 'jaxlib', 'flax', 'torch', 'pyarrow', 'tensorflow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"
