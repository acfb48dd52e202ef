"""Generated word problems with whole answers, short and plain enough for a tiny policy: "Tom has 7 pens, loses 3. How many?"

A beginning gives a number of things, each step after it adds, takes away, or doubles. Held out are expressions, whatever the
names and things; worked out step by step, they consist of smaller ones that training has too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from popo_jax.task_config import MathConfig
from popo_jax.tasks.files import Row, Split
from popo_jax.types import UserError

NAMES = ("Tom", "Ann", "Ben", "Mia", "Sam", "Eva")
THINGS = ("pens", "cups", "nuts", "eggs", "keys", "hats")
GAINS, LOSSES = ("gets", "buys", "finds"), ("loses", "sells", "eats")
MAX_STEPS, MAX_NUMBER = 3, 99
"""So that a problem has at most 64 characters and its answer is below ten thousand."""
MAX_BAGS = 5
ROUNDS = 64
"""Times as many problems are drawn as wanted, before there are too few of them."""


def generate(c: MathConfig) -> Split:
    """`train_problems` and `eval_problems` of `c.steps` steps and numbers up to `c.high`. Errors: UserError for too few."""
    rng = np.random.default_rng([c.seed, c.steps, c.high])
    held_out: dict[str, Row] = {}
    for _ in range(ROUNDS):
        for row in _drawn(c, rng, c.eval_problems):
            if len(held_out) < c.eval_problems:
                held_out.setdefault(row["expression"], row)
    train: list[Row] = []
    for i in range(ROUNDS):
        train += [p for p in _drawn(c, rng, c.train_problems) if p["expression"] not in held_out]
        if len(train) >= c.train_problems and len(held_out) == c.eval_problems:
            return train[: c.train_problems], list(held_out.values())
        if i == 0 and len(train) < c.train_problems / ROUNDS:
            break
    space = f"{len(held_out)} expressions of {c.steps} steps with numbers up to {c.high}"
    raise UserError(f"math.eval_problems must leave problems to train on, got {c.eval_problems} of {space}")


def _drawn(c: MathConfig, rng: np.random.Generator, n: int) -> list[Row]:
    return [_problem(c, draw) for draw in rng.integers(0, 1 << 30, (n, 5 + 2 * c.steps)).tolist()]


def _problem(c: MathConfig, draw: Sequence[int]) -> Row:
    """The problem that random numbers decide."""
    name, thing, kind, first, second, *rest = draw
    who, what = NAMES[name % len(NAMES)], THINGS[thing % len(THINGS)]
    a, b, bags = 1 + first % c.high, 1 + second % c.high, 2 + second % (MAX_BAGS - 1)
    openings: Mapping[int, tuple[str, list[str], int]] = {
        0: (f"{who} has {a} {what}", [f"{a}"], a),
        1: (f"{who} has {a} {what} and {b} more", [f"{a}", f"+{b}"], a + b),
        2: (f"{who} has {bags} bags of {a} {what}", [f"{bags}", f"*{a}"], bags * a),
    }
    text, work, value = openings[kind % 3]
    left = c.steps + 1 - len(work)
    for choice, number in zip(rest[:left], rest[c.steps : c.steps + left], strict=True):
        clause, sign, value = _step(choice, number, value, c.high)
        text, work = f"{text}, {clause}", [*work, sign]
    return {"problem": f"{text}. How many?", "answer": str(value), "expression": "".join(work), "work": tuple(work)}


def _step(choice: int, number: int, value: int, high: int) -> tuple[str, str, int]:
    """(words, sign and number, value after it): never below zero."""
    kind, word = choice % 7, choice // 7 % 3
    if kind == 6:
        return "doubles", "*2", 2 * value
    if kind < 3 or value == 0:
        n = 1 + number % high
        return f"{GAINS[word]} {n}", f"+{n}", value + n
    n = 1 + number % min(value, high)
    return f"{LOSSES[word]} {n}", f"-{n}", value - n


def worked(work: Sequence[str], *, slip: int = 0, at: int = -1) -> tuple[str, int]:
    """(a line for each step, what comes out) of a problem's `work`, from left to right; step `at` is wrong by `slip`.

    worked(("7", "-3", "+5")) == ("7-3=4\n4+5=9", 9)
    """
    value, lines = int(work[0]), []
    for i, step in enumerate(work[1:]):
        sign, n = step[0], int(step[1:])
        result = value * n if sign == "*" else value + n if sign == "+" else value - n
        result += slip if i == at else 0
        lines.append(f"{value}{step}={result}")
        value = result
    return "\n".join(lines), value
