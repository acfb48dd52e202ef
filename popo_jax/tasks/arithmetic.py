"""Arithmetic: the value of a written sum or product of whole numbers, such as 7+8*3. Data, prompt, verifier, teacher.

The answer is one whole number, alone in the response or between <answer> tags (the last pair counts): ASCII digits, "-" in
front of it if it is below zero, no leading zeros. Multiplication comes before addition and subtraction.
"""

from __future__ import annotations

import hashlib
import math
import operator
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from popo_jax.task_config import ArithmeticConfig, TaskConfig
from popo_jax.tasks import files
from popo_jax.tasks.tags import answer_text
from popo_jax.types import UserError, Verdict

MAX_TERMS = 6
"""Numbers in a generated expression."""
MAX_VALUE = 10**9 - 1
"""Of a number in an expression, and of a given value's size: nine digits."""
SLIP = 10
"""The largest distance of a teacher's wrong answer from the right one."""

Problem = Mapping[str, Any]
_WHOLE = re.compile(r"-?(?:0|[1-9][0-9]{0,59})")


def grade(response: str, *, value: int) -> Verdict:
    """Is the response's number `value`?

    Score 1: right. 0.1: a whole number, but another one. 0: no answer, or malformed (a plus sign, leading zeros, a fraction,
    words, several numbers, characters beyond ASCII, more than sixty digits). Errors: none on any text; TypeError if `value`
    is not an integer.
    """
    expected, answer = operator.index(value), answer_text(response)
    if not answer:
        return Verdict(0.0, 0.0, "no answer")
    if not _WHOLE.fullmatch(answer):
        return Verdict(0.0, 0.0, "malformed")
    return Verdict(1.0, 1.0, "right") if int(answer) == expected else Verdict(0.1, 0.0, "wrong value")


def prompt_text(problem: Problem) -> str:
    """E.g. "7+8*3="."""
    return f"{problem['expression']}="


def problem_id(problem: Problem) -> str:
    return "arithmetic-" + hashlib.sha256(prompt_text(problem).encode()).hexdigest()[:12]


def answer_fields(problem: Problem) -> dict[str, Any]:
    return {"value": problem["value"]}


def key(problem: Problem) -> str:
    """What training and held-out problems never share."""
    return "".join(problem["expression"].split())


def load(config: TaskConfig) -> files.Split:
    """Training and held-out problems, from files where given, else generated; no expression on both sides. Errors: UserError."""
    return files.split(config, lambda taken: generate(config.arithmetic, taken), read, key)


def read(path: epath.PathLike) -> list[files.Row]:
    """Problems of a file with columns `expression` (any text) and `value`; other columns are kept. Errors: UserError."""
    rows = files.read_rows(path, ("expression", "value"))
    for number, row in rows:
        where, text, value = files.place(path, number), row["expression"], row["value"]
        files.need(isinstance(text, str) and bool(text.strip()), f"{where}: expression", "a text that is not blank", text)
        files.need(files.whole(value, -MAX_VALUE, MAX_VALUE), f"{where}: value", "a whole number of at most nine digits", value)
    return [row for _, row in rows]


def generate(c: ArithmeticConfig, taken: frozenset[Any] = frozenset()) -> files.Split:
    """Expressions of `c.terms` numbers for training and held out, drawn without repetition, none in `taken`.

    A held-out expression occurs once; the training ones are gone through again where there are fewer than problems.
    Errors: UserError for a setting out of range, or too few expressions.
    """
    _check(c)
    space = (c.high - c.low + 1) ** c.terms * len(c.operators) ** (c.terms - 1)
    wanted = min(space, c.train_problems + c.eval_problems + len(taken))
    numbers = np.random.default_rng([c.seed, c.terms]).choice(space, wanted, replace=False)
    problems = [p for p in (_problem(int(i), c) for i in numbers) if key(p) not in taken]
    held_out, train = problems[: c.eval_problems], problems[c.eval_problems :][: c.train_problems]
    if not train:
        where = f"{wanted} with {c.terms} numbers from {c.low} to {c.high} and {c.operators}"
        raise UserError(f"arithmetic.eval_problems must leave a problem to train on, got {c.eval_problems} of {where}")
    return [train[i % len(train)] for i in range(c.train_problems)], held_out


def _check(c: ArithmeticConfig) -> None:
    choices = len(c.operators) * max(c.high - c.low + 1, 1)
    for name, test, expected in (
        ("terms", 1 <= c.terms <= MAX_TERMS, f"lie between 1 and {MAX_TERMS}"),
        ("low", 0 <= c.low <= c.high, "lie between 0 and arithmetic.high"),
        ("high", c.high <= MAX_VALUE and choices**c.terms < 2**63, "give fewer than 2^63 expressions"),
        ("operators", c.operators and set(c.operators) <= set("+-*"), 'be some of the signs "+-*"'),
        ("operators", len(set(c.operators)) == len(c.operators), "name each sign once"),
        ("train_problems", c.train_problems >= 1, "be at least 1"),
        ("eval_problems", c.eval_problems >= 1, "be at least 1"),
        ("seed", c.seed >= 0, "be at least 0"),
    ):
        if not test:
            raise UserError(f"arithmetic.{name} must {expected}, got {getattr(c, name)}")


def _problem(i: int, c: ArithmeticConfig) -> files.Row:
    """Expression number i of the space, digit by digit: a number, then operator and number in turn."""
    i, first = divmod(i, c.high - c.low + 1)
    parts: list[Any] = [c.low + first]
    for _ in range(c.terms - 1):
        i, sign = divmod(i, len(c.operators))
        i, number = divmod(i, c.high - c.low + 1)
        parts += [c.operators[sign], c.low + number]
    signs = "".join(sorted({str(p) for p in parts[1::2]}))
    return {"expression": "".join(map(str, parts)), "value": _value(parts), "signs": signs}


def _value(parts: list[Any]) -> int:
    """Of number, sign, number, ...: a sum of signed products."""
    products = [[parts[0]]]
    for sign, number in zip(parts[1::2], parts[2::2], strict=True):
        if sign == "*":
            products[-1].append(number)
        else:
            products.append([1 if sign == "+" else -1, number])
    return sum(map(math.prod, products))


def teacher_answer(problem: Problem, rng: np.random.Generator, *, right: float) -> str:
    """With probability `right` the value, else a whole number within SLIP of it."""
    slip = 0 if rng.random() < right else int(rng.integers(1, SLIP + 1)) * (1 if rng.random() < 0.5 else -1)
    return str(problem["value"] + slip)
