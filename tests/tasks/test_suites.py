"""Suites by name: found whatever the capitals, asked of the hub as their table says, read from a file instead."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from popo_jax.task_config import TASK_NAMES, MathConfig, TaskConfig
from popo_jax.tasks import mathematics, suites
from popo_jax.types import UserError

BASE = TaskConfig("math", verifier="mine:grade", math=MathConfig(instruction="Box it."))
COLUMNS = {
    "aime24": {"problem": "p", "answer": "204", "solution": "long", "url": "u"},
    "aime25": {"problem": "p", "answer": "70", "id": "0"},
    "amc23": {"question": "p", "answer": 27.0},
    "math500": {"problem": "p", "answer": r"\frac{1}{2}", "solution": "long"},
    "minerva": {"question": "p", "answer": "1e33"},
    "olympiadbench": {"question": "p", "final_answer": ["$2$", "5"], "solution": ["long"], "context": None},
}
"""A row as each data set has it."""


@pytest.mark.parametrize("name", COLUMNS)
def test_a_suite_is_asked_of_the_hub_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, split: str) -> list[dict[str, Any]]:
        asked.append((*args, split))
        key = next(k for k in ("problem", "question") if k in COLUMNS[name])
        return [{**COLUMNS[name], key: f"p{i % 3}"} for i in range(4)]  # the last is the first again

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    suite = suites.find(name)
    assert suite is not None
    problems = mathematics.load_all(suites.config(BASE, suite, None, problem=None, answer=None))
    assert asked == [(suite.dataset, suite.subset, suite.split)]
    assert [mathematics.prompt_text(p) for p in problems] == [f"p{i}\nBox it." for i in range(3)]
    gold = {"amc23": "27.0", "olympiadbench": "$2$, 5"}.get(name) or COLUMNS[name]["answer"]
    assert {p["answer"] for p in problems} == {gold}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_suites_file_needs_no_columns_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(COLUMNS[name]) + "\n")
    suite = suites.find(name)
    assert len(mathematics.load_all(suites.config(BASE, suite, str(tmp_path / "x.jsonl"), problem=None, answer=None))) == 1


def test_a_context_stands_above_the_question(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(COLUMNS["olympiadbench"] | {"context": "Let x = 3. "}) + "\n")
    (problem,) = mathematics.load_all(suites.config(BASE, None, str(tmp_path / "x.jsonl"), problem=None, answer=None))
    assert problem["problem"] == "Let x = 3.\np"


def test_names() -> None:
    assert suites.find("AIME24") is suites.find("aime24") is suites.SUITES["aime24"]
    assert [suites.find(t) for t in TASK_NAMES] == [None] * len(TASK_NAMES)
    with pytest.raises(UserError, match=r"--task must be one of AIME24, .*, geometry, got 'AIME2024' \(did you mean aime24\?\)"):
        suites.find("AIME2024")


def test_no_source_is_told() -> None:
    with pytest.raises(UserError, match="expected a file or a data set of mathematics problems, got neither"):
        mathematics.load_all(suites.config(BASE, None, None, problem=None, answer=None))


def test_a_suite_is_graded_by_our_own_verifier_and_your_file_by_yours() -> None:
    made = [suites.config(BASE, s, "x.jsonl", problem=None, answer=None) for s in (suites.find("amc23"), None)]
    assert [c.verifier for c in made] == [None, "mine:grade"]
