"""Visual geometry: verdicts by hand, hostile text, the same through the pool; prompts, ids, pictures, the teacher, settings."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from popo_jax import rules
from popo_jax.config import from_dict
from popo_jax.task_config import GeometryConfig, TaskConfig
from popo_jax.tasks import geometry, get_task, quantities
from popo_jax.tasks.geometry import last_box
from popo_jax.tasks.graders import Graders
from popo_jax.tasks.pool import Pool
from popo_jax.types import UserError, Verdict
from tests.tasks.geometry_answers import HOSTILE, RIGHT, UNDONE, WRONG


def cases(table: list[tuple[str, str]]) -> list[Any]:
    return [pytest.param(g, t, id=f"{g}<-{ascii(t)[:40]}") for g, t in table]


@pytest.mark.parametrize(("gold", "text"), cases(RIGHT))
def test_right_answers(gold: str, text: str) -> None:
    assert geometry.grade(f"So it is \\boxed{{{text}}}.", answer=gold) == Verdict(1.0, 1.0, "right")


@pytest.mark.parametrize(("gold", "text"), cases(WRONG))
def test_wrong_answers(gold: str, text: str) -> None:
    began = time.monotonic()
    verdict = geometry.grade(f"So it is \\boxed{{{text}}}", answer=gold)
    assert verdict in (Verdict(0.1, 0.0, "wrong"), Verdict(0.0, 0.0, "no answer"))
    assert verdict.reason == "wrong" or text.count("{") != text.count("}")
    assert time.monotonic() - began < 3.0  # half a second of them is the import of math-verify


@pytest.mark.parametrize(("gold", "text"), cases(UNDONE))
def test_work_that_is_left_to_do_is_refused(gold: str, text: str) -> None:
    assert geometry.grade(f"So it is \\boxed{{{text}}}", answer=gold) == Verdict(0.1, 0.0, "not worked out")


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("", "no answer"),
        ("45", "no answer"),
        ("It is 45.", "no answer"),
        (r"\boxed{}", "no answer"),
        (r"\boxed{ }", "no answer"),
        (r"\boxed{45", "no answer"),
        (r"\boxed{44} no, \boxed{45}", "right"),
        (r"\boxed{45} no, \boxed{44}", "wrong"),
        (r"\boxed{44}\boxed{45}", "right"),
        (r"\boxed{44 \boxed{45}", "right"),  # the first stays open
        (r"\boxed{45}\boxed{", "no answer"),
        (r"\fbox{45}", "right"),
        (r"50+85=135\n180-135=45\n\boxed{45}", "right"),
        (r"<think>\boxed{44}</think>\boxed{45}", "right"),
        (r"<think>\boxed{45}</think>\boxed{44}", "wrong"),
        (r"<think>\boxed{45}</think>", "no answer"),
        (r"<think>\boxed{45}", "unfinished thinking"),
        (r"\boxed{45}</think>", "no answer"),
    ],
)
def test_where_the_answer_stands(response: str, reason: str) -> None:
    score = {"right": 1.0, "wrong": 0.1}.get(reason, 0.0)
    assert geometry.grade(response, answer="45") == Verdict(score, float(reason == "right"), reason)


def test_hostile_text_is_graded_here_and_now() -> None:
    for gold in ("45", r"5\sqrt{3}", "2x+3", "(3, 4)"):
        for text in HOSTILE:
            began = time.monotonic()
            verdict = geometry.grade(text, answer=gold)
            assert verdict.correct == 0 and verdict.score <= 0.1, (gold, text[:60])
            assert time.monotonic() - began < 3.0, (gold, text[:60])


@pytest.mark.parametrize(("gold", "text"), cases([("10", "10.2"), ("21.8", "22.1"), (r"\sqrt{2}", "1.4")]))
def test_the_tolerance_is_a_setting(gold: str, text: str) -> None:
    text = f"\\boxed{{{text}}}"
    assert geometry.grade(text, answer=gold, tolerance=0.05).correct == 1
    assert geometry.grade(text, answer=gold).correct == geometry.grade(text, answer=gold, tolerance=0.0).correct == 0
    assert geometry.grade("\\boxed{11}", answer="10", tolerance=0.2).correct == 0
    assert geometry.grade(r"\boxed{3}", answer="4", format_score=0.0) == Verdict(0.0, 0.0, "wrong")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool({"geometry": "popo_jax.tasks.geometry:grade"}, workers=1, seconds=5.0) as p:
        yield p


def test_the_same_verdicts_come_from_the_pool(pool: Pool) -> None:
    jobs = [("geometry", f"\\boxed{{{t}}}", {"answer": g}) for g, t in (RIGHT + WRONG + UNDONE)[::3]]
    jobs += [("geometry", t, {"answer": "45", "tolerance": 0.01, "format_score": 0.0}) for t in HOSTILE]
    assert pool(jobs) == [geometry.grade(text, **fields) for _, text, fields in jobs]


def test_a_run_grades_geometry_in_the_pool() -> None:
    with Graders(from_dict({"tasks": [{"name": "geometry"}], "verifier": {"workers": 1}})) as grade:
        assert grade._pool is not None
        assert [v.reason for v in grade([("geometry", r"\boxed{5 cm}", {"answer": "5"})])] == ["right"]


def test_boxes_within_boxes() -> None:
    for text, inside in (
        (r"\boxed{\boxed{45}}", "45"),
        (r"\boxed{30\boxed{45}}", r"30\boxed{45}"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{}}", ""),
        ("45", None),
    ):
        assert last_box(text) == inside


def test_running_out_of_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_: str) -> None:
        raise MemoryError

    monkeypatch.setattr(quantities, "read", read)
    with pytest.raises(MemoryError):
        geometry.grade(r"\boxed{4}", answer="4")


# Prompts, ids, pictures


def given(**more: Any) -> dict[str, Any]:
    images = [{"bytes": b"a picture", "sha256": "0" * 64}]
    return {"problem": "<image>Find x.", "answer": "45", "instruction": "Box it.", "images": images, **more}


def test_prompt_fields_and_id() -> None:
    p = given()
    assert geometry.prompt_text(p) == "<image>Find x.\nBox it." and geometry.prompt_text(given(instruction="")) == p["problem"]
    assert geometry.answer_fields(p) == {"answer": "45"}
    assert geometry.answer_fields(given(tolerance=0.5, format_score=0.0)) == {
        "answer": "45",
        "tolerance": 0.5,
        "format_score": 0.0,
    }
    same = [p, given(instruction=""), given(images=[{"path": "elsewhere", "sha256": "0" * 64}])]
    others = [given(answer="46"), given(problem="<image>Find y."), given(images=[{"bytes": b"", "sha256": "1" * 64}])]
    assert len({geometry.problem_id(q) for q in same}) == 1
    assert len({geometry.problem_id(q) for q in [p, *others, given(images=p["images"] * 2)]}) == 5
    assert geometry.problem_id(given(problem="\ud800")).startswith("geometry-")


def test_an_image_without_a_hash_is_hashed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"content")
    at_path, in_memory = ({"path": str(tmp_path / "a.png")}, {"bytes": b"content"})
    assert geometry.problem_id(given(images=[at_path])) == geometry.problem_id(given(images=[in_memory]))
    assert geometry.pictures(given(images=[at_path, in_memory])) == [str(tmp_path / "a.png"), b"content"]


def small(**more: Any) -> TaskConfig:
    return TaskConfig("geometry", geometry=GeometryConfig(**{"train_problems": 300, "eval_problems": 60, **more}))


def test_generated_problems_are_complete() -> None:
    train, held_out = get_task("geometry").load(small(tolerance=0.01))
    assert (len(train), len(held_out)) == (300, 60)
    for p in [*train, *held_out]:
        (picture,) = geometry.pictures(p)
        assert picture.size == (56, 56) and p["problem"].count("<image>") == 1
        assert geometry.grade(f"\\boxed{{{p['answer']}}}", **geometry.answer_fields(p)).correct == 1
        assert geometry.answer_fields(p)["tolerance"] == 0.01
    ids = [{geometry.problem_id(p) for p in side} for side in (train, held_out)]
    assert len(ids[1]) == 60 and not ids[0] & ids[1]


# The teacher


def test_the_teacher_of_drawn_figures_shows_its_working_and_slips_as_told() -> None:
    train, _ = geometry.load(small())
    rng, said = np.random.default_rng(0), set()
    for p in train:
        for right in (0.0, 1.0):
            text = geometry.teacher_answer(p, rng, right=right)
            lines = text.split("\n")
            assert text.isascii() and len(text) <= 50 and lines[-1] == f"\\boxed{{{lines[-2].split('=')[-1]}}}"
            assert geometry.grade(text, **geometry.answer_fields(p)).reason == ("right" if right else "wrong"), (p, text)
            said |= {text} if right else set()
    assert "50+60=110" in geometry.teacher_answer({"work": ("50+60", "180-_")}, rng, right=1.0)
    assert geometry.teacher_answer({"work": ("50+60", "180-_")}, rng, right=1.0) == "50+60=110\n180-110=70\n\\boxed{70}"
    assert len(said) > 200


def test_the_teacher_is_right_in_its_share() -> None:
    rng, p = np.random.default_rng(0), {"work": ("50+60", "180-_"), "answer": "70"}
    texts = [geometry.teacher_answer(p, rng, right=0.3) for _ in range(2000)]
    assert abs(sum(t.endswith("{70}") for t in texts) / 2000 - 0.3) < 0.045
    assert {t.startswith("50+60=110") for t in texts if not t.endswith("{70}")} == {True, False}  # either step


@pytest.mark.parametrize("answer", ["45", "5 \\sqrt{3}", "21.8"])
def test_the_teacher_of_given_problems_is_that_of_mathematics(answer: str) -> None:
    rng, p = np.random.default_rng(0), given(answer=answer)
    for i in range(50):
        text = geometry.teacher_answer(p, rng, right=float(i % 2))
        wrong = "not worked out" if answer == "21.8" else "wrong"  # a sum
        assert geometry.grade(text, answer=answer).reason == ("right" if i % 2 else wrong), text


# Settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tolerance": 1.0}, "geometry.tolerance must lie in [0, 1), got 1.0"),
        ({"tolerance": float("nan")}, "geometry.tolerance must lie in [0, 1), got nan"),
        ({"format_score": -0.1}, "geometry.format_score must lie in [0, 1), got -0.1"),
        ({"eval_problems": 0}, "geometry.eval_problems must be at least 1, got 0"),
        ({"seed": -1}, "geometry.seed must be at least 0, got -1"),
    ],
    ids=str,
)
def test_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        geometry.load(small(**change))


def test_settings_that_are_not_read_are_named() -> None:
    def unread(**task: Any) -> set[str]:
        c = rules.resolve(from_dict({"tasks": [{"name": "geometry", **task}]}))
        return {k.removeprefix("tasks.0.geometry.") for k in rules.unread(c) if k.startswith("tasks.0.geometry.")}

    drawn = {"kinds", "low", "high", "step", "size", "jitter", "train_problems"}
    assert unread() == {"dataset_name", "train_split", "eval_split"}
    assert unread(train_file="x.jsonl") == drawn | {"dataset_name", "train_split", "eval_split"}
    assert unread(geometry={"dataset": "a/b"}) == drawn
    assert unread(geometry={"dataset": "a/b", "eval_split": "test"}) == drawn | {"eval_problems", "seed"}
    assert unread(geometry={"dataset": "a/b"}, train_file="x.jsonl") == drawn | {"train_split"}
