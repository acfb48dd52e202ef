"""Arithmetic: the verifier's table, generated problems against Python's own arithmetic, the teacher, files."""

from __future__ import annotations

import ast
import json

import numpy as np
import pytest

from popo_jax.task_config import ArithmeticConfig, TaskConfig
from popo_jax.tasks import arithmetic
from popo_jax.types import UserError

SCORES = {"right": (1.0, 1.0), "wrong value": (0.1, 0.0), "no answer": (0.0, 0.0), "malformed": (0.0, 0.0)}

# name: (response, reason), for the value -7
TABLE = {
    "right": ("-7", "right"),
    "blanks around": (" \t-7\r\n", "right"),
    "tag": ("so <answer> -7 </answer>", "right"),
    "last pair counts": ("<answer>-7</answer><answer>7</answer>", "wrong value"),
    "sign lost": ("7", "wrong value"),
    "sixty digits": ("9" * 60, "wrong value"),
    "sixty-one digits": ("9" * 61, "malformed"),
    "a million digits": ("9" * 10**6, "malformed"),
    "empty": ("", "no answer"),
    "open tag": ("<answer>-7", "no answer"),
    "plus": ("+7", "malformed"),
    "leading zero": ("-07", "malformed"),
    "minus zero is zero": ("-0", "wrong value"),
    "blank after the sign": ("- 7", "malformed"),
    "two numbers": ("-7 -7", "malformed"),
    "equation": ("=-7", "malformed"),
    "decimal point": ("-7.0", "malformed"),
    "exponent": ("-7e0", "malformed"),
    "underscore": ("-0_7", "malformed"),
    "words": ("minus seven", "malformed"),
    "expression": ("3-10", "malformed"),
    "fullwidth digit": ("-\uff17", "malformed"),
    "arabic-indic digit": ("-\u0667", "malformed"),
    "minus sign": ("\u22127", "malformed"),
    "NUL": ("-7\x00", "malformed"),
    "lone surrogate": ("\ud800-7", "malformed"),
    "two lines": ("-7\n-7", "malformed"),
}


@pytest.mark.parametrize("name", TABLE)
def test_by_hand(name: str) -> None:
    response, reason = TABLE[name]
    v = arithmetic.grade(response, value=-7)
    assert (v.reason, v.score, v.correct) == (reason, *SCORES[reason])


def python_value(expression: str) -> int:
    """By Python's parser: nothing of ours."""

    def of(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            left, right = of(node.left), of(node.right)
            return {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}[type(node.op)]
        assert isinstance(node, ast.Constant)
        return node.value

    return of(ast.parse(expression, mode="eval").body)


@pytest.mark.parametrize(
    "c",
    [
        ArithmeticConfig(),
        ArithmeticConfig(terms=4, low=3, high=99, operators="*-+", train_problems=3000),
        ArithmeticConfig(terms=1, high=999, train_problems=2000, eval_problems=100),
        ArithmeticConfig(terms=6, high=99, operators="+-*", train_problems=500, eval_problems=64),
    ],
    ids=["default", "four terms, every sign", "numbers alone", "a large space"],
)
def test_problems_have_their_value_and_sides_share_none(c: ArithmeticConfig) -> None:
    train, held_out = arithmetic.generate(c)
    assert (len(train), len(held_out)) == (c.train_problems, c.eval_problems)
    assert all(p["value"] == python_value(p["expression"]) for p in [*train, *held_out])
    texts = {p["expression"] for p in held_out}
    assert len(texts) == len(held_out) and not texts & {p["expression"] for p in train}
    assert {ch for t in texts for ch in t} - set("0123456789") == (set(c.operators) if c.terms > 1 else set())
    assert (train, held_out) == arithmetic.generate(c)


def test_the_whole_space_is_gone_through() -> None:
    c = ArithmeticConfig(terms=2, low=2, high=4, operators="+*", train_problems=20, eval_problems=5)
    train, held_out = arithmetic.generate(c)
    every = {f"{a}{s}{b}" for a in (2, 3, 4) for b in (2, 3, 4) for s in "+*"}
    assert {p["expression"] for p in [*train, *held_out]} == every
    taken = frozenset(p["expression"] for p in held_out)
    again, other = arithmetic.generate(c, taken)
    assert not taken & {p["expression"] for p in [*again, *other]}


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"terms": 0}, "terms"),
        ({"terms": 7}, "terms"),
        ({"low": 5, "high": 4}, "low"),
        ({"low": -1}, "low"),
        ({"terms": 6, "high": 10**8}, "high"),
        ({"operators": ""}, "operators"),
        ({"operators": "+/"}, "operators"),
        ({"operators": "++"}, "operators"),
        ({"terms": 1, "high": 9, "eval_problems": 10}, "leave a problem"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(setting: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        arithmetic.generate(ArithmeticConfig(**setting))


def test_the_teacher_is_right_as_often_as_asked_and_wrong_within_a_slip() -> None:
    problem, rng = {"expression": "3-10", "value": -7}, np.random.default_rng(0)
    answers = [arithmetic.teacher_answer(problem, rng, right=0.3) for _ in range(4000)]
    verdicts = [arithmetic.grade(a, value=-7).reason for a in answers]
    assert set(verdicts) == {"right", "wrong value"} and abs(verdicts.count("right") / 4000 - 0.3) < 0.03
    assert {abs(int(a) + 7) for a in answers} == set(range(arithmetic.SLIP + 1))


def test_files(tmp_path) -> None:
    good = tmp_path / "good.jsonl"
    good.write_text("\n".join(json.dumps({"expression": e, "value": v, "level": 1}) for e, v in (("1+1", 2), ("2*3", 6))))
    train, held_out = arithmetic.load(TaskConfig(name="arithmetic", train_file=str(good)))
    assert [p["level"] for p in train] == [1, 1] and not {"1+1", "2*3"} & {p["expression"] for p in held_out}
    for row in ({"expression": " ", "value": 2}, {"expression": "1+1", "value": 2.0}, {"expression": "1+1", "value": 10**9}):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(json.dumps(row))
        with pytest.raises(UserError, match=r"bad.jsonl, line 1: (expression|value)"):
            arithmetic.read(bad)
