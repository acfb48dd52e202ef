"""Countdown: reach a target from all the given numbers, each used once, with + - * /. Data, prompt, verifier, teacher.

The answer is an expression, alone in the response or between <answer> tags (the last pair counts):
    sum = product (("+" | "-") product)*     product = atom (("*" | "/") atom)*     atom = number | "(" sum ")"
Numbers are ASCII digits without sign or leading zeros; spaces and tabs may stand between tokens. Values are exact fractions.
"""

from __future__ import annotations

import hashlib
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import combinations_with_replacement, product
from typing import Any

import numpy as np
from etils import epath

from popo_jax.task_config import CountdownConfig, TaskConfig
from popo_jax.tasks import files
from popo_jax.tasks.tags import answer_text
from popo_jax.types import UserError, Verdict

MAX_ANSWER, MAX_DEPTH = 256, 32
"""Characters of an expression; brackets open at once."""
MAX_NUMBERS, MAX_SOLVED = 8, 5
"""Numbers of a problem; of one whose expressions can all be gone through."""
MAX_VALUE = 10**9 - 1
"""Of a number and of a target's size: nine digits."""

Problem = Mapping[str, Any]
Ratio = tuple[int, int]
"""A fraction in lowest terms: numerator, denominator above 0."""
Text = tuple[str, int]
"""An expression and its level: that of its last operator, 3 for a number."""
Way = tuple[str, tuple[int, ...], Ratio, tuple[int, ...], Ratio]
"""Last step of an expression: operator, left numbers (sorted) and their value, right numbers and theirs."""

PROMPT = CountdownConfig.prompt
_LEVEL = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2}
_TOKEN = re.compile(r"[ \t]*(?:(0|[1-9][0-9]{0,8})|([-+*/()]))")


def grade(response: str, *, nums: Iterable[int], target: int) -> Verdict:
    """Is the response's expression made of exactly `nums`, and worth `target`?

    Score 1: right. 0.1: well-formed, but wrong numbers or a wrong value (division by zero has none). 0: no answer, or malformed.
    Malformed: a sign (-3), `**`, `//`, "= 7" at the end, line breaks, characters beyond ASCII, more than 256 characters, 32 open
    brackets or nine digits a number. Errors: none on any text; TypeError if `nums` or `target` are not integers.
    """
    answer = answer_text(response)
    if not answer:
        return Verdict(0.0, 0.0, "no answer")
    parsed = _parse(answer)
    if parsed is None:
        return Verdict(0.0, 0.0, "malformed")
    numbers, value = parsed
    if sorted(numbers) != sorted(map(operator.index, nums)):
        return Verdict(0.1, 0.0, "wrong numbers")
    right = value == (operator.index(target), 1)
    return Verdict(1.0, 1.0, "right") if right else Verdict(0.1, 0.0, "wrong value")


def _parse(text: str) -> tuple[list[int], Ratio | None] | None:
    """Numbers and value of an expression, by operator precedence with a stack; None if it is malformed."""
    numbers: list[int] = []
    values: list[Ratio | None] = []
    waiting: list[str] = []
    position, after_operand = 0, False

    def reduce(level: int) -> None:
        while waiting and _LEVEL[waiting[-1]] >= level:
            right, left = values.pop(), values.pop()
            values.append(_apply(waiting.pop(), left, right))

    while position < len(text) <= MAX_ANSWER:
        token = _TOKEN.match(text, position)
        if token is None or waiting.count("(") > MAX_DEPTH:
            return None
        position, (number, sign) = token.end(), token.groups()
        if (number is not None or sign == "(") == after_operand:
            return None  # two operands side by side, or an operator or a bracket without what goes before it
        if number is not None:
            numbers.append(int(number))
            values.append((numbers[-1], 1))
            after_operand = True
        elif sign == ")":
            reduce(1)
            if not waiting:
                return None
            waiting.pop()
        else:
            if sign != "(":
                reduce(_LEVEL[sign])
            waiting.append(sign)
            after_operand = False
    if after_operand:
        reduce(1)
    return (numbers, values[0]) if after_operand and not waiting else None


def _apply(sign: str, left: Ratio | None, right: Ratio | None) -> Ratio | None:
    """left sign right; None if that, or one of them, divides by zero."""
    if left is None or right is None:
        return None
    (p, q), (r, s) = left, right
    if sign in "*/":
        n, d = (p * r, q * s) if sign == "*" else (p * s, q * r)
    else:
        n, d = (p * s + r * q if sign == "+" else p * s - r * q), q * s
    if d == 0:
        return None
    g = math.gcd(n, d) if d > 0 else -math.gcd(n, d)
    return n // g, d // g


def prompt_text(problem: Problem) -> str:
    """The config's prompt around the problem; by default e.g. "3 5 7 -> 56:"."""
    nums, target = " ".join(map(str, problem["nums"])), str(problem["target"])
    return problem.get("prompt", PROMPT).replace("{nums}", nums).replace("{target}", target)


def problem_id(problem: Problem) -> str:
    """Of the numbers and the target, however they are asked for."""
    bare = {"nums": problem["nums"], "target": problem["target"]}
    return "countdown-" + hashlib.sha256(prompt_text(bare).encode()).hexdigest()[:12]


def answer_fields(problem: Problem) -> dict[str, Any]:
    return {"nums": tuple(problem["nums"]), "target": problem["target"]}


def key(problem: Problem) -> tuple[int, ...]:
    """What training and held-out problems never share: the sorted numbers, then the target."""
    return (*sorted(problem["nums"]), problem["target"])


def load(config: TaskConfig) -> files.Split:
    """Training and held-out problems, from files where given, else generated; no key on both sides. Errors: UserError."""
    train, held_out = files.split(config, lambda taken: generate(config.countdown, taken), read, key)
    prompt = {"prompt": config.countdown.prompt}
    return [{"size": len(p["nums"])} | p | prompt for p in train], [{"size": len(p["nums"])} | p | prompt for p in held_out]


def read(path: epath.PathLike) -> list[files.Row]:
    """Problems of a file with columns `nums` and `target`; other columns are kept. Errors: UserError with the line or row."""
    rows = files.read_rows(path, ("nums", "target"))
    for number, row in rows:
        nums, target, where = row["nums"], row["target"], files.place(path, number)
        good = isinstance(nums, list) and 1 <= len(nums) <= MAX_NUMBERS and all(files.whole(n, 0, MAX_VALUE) for n in nums)
        files.need(good, f"{where}: nums", f"a list of 1 to {MAX_NUMBERS} whole numbers from 0 to {MAX_VALUE}", nums)
        files.need(
            files.whole(target, -MAX_VALUE, MAX_VALUE), f"{where}: target", "a whole number of at most nine digits", target
        )
    return [row for _, row in rows]


def generate(c: CountdownConfig, taken: frozenset[Any] = frozenset()) -> files.Split:
    """Solvable problems for training and held out, `c.numbers` in equal shares, none with a key in `taken`.

    The distinct keys are cut in two, so the sides share none. A held-out key occurs once; the training keys are gone through
    again where there are fewer than problems. Errors: UserError for a setting out of range, or too few keys.
    """
    _check(c)
    sides: files.Split = ([], [])
    for n in sorted(set(c.numbers)):
        rng = np.random.default_rng([c.seed, n])
        k, m = (sum(c.numbers[i % len(c.numbers)] == n for i in range(size)) for size in (c.train_problems, c.eval_problems))
        keys = np.array(_keys(n, c, taken, rng, k + m), np.int64).reshape(-1, n + 1)
        if len(keys) <= m:
            space = f"{n} numbers from {c.low} to {c.high} and targets from {c.target_low} to {c.target_high}"
            raise UserError(f"countdown.eval_problems must leave a problem to train on, got {m} of {len(keys)} with {space}")
        for side, rows in zip(sides, (keys[m:][np.arange(k) % (len(keys) - m)], keys[:m]), strict=True):
            nums = rng.permuted(rows[:, :-1], axis=1).tolist()
            side += [{"nums": x, "target": t} for x, t in zip(nums, rows[:, -1].tolist(), strict=True)]
    for side in sides:
        np.random.default_rng(c.seed).shuffle(side)
    return sides


def _check(c: CountdownConfig) -> None:
    for name, test, expected in (
        ("numbers", c.numbers and all(1 <= n <= MAX_SOLVED for n in c.numbers), f"list whole numbers from 1 to {MAX_SOLVED}"),
        ("low", 1 <= c.low <= c.high, "lie between 1 and countdown.high"),
        ("high", c.high <= MAX_VALUE, f"be at most {MAX_VALUE}"),
        ("target_low", -MAX_VALUE <= c.target_low <= c.target_high, f"lie between -{MAX_VALUE} and countdown.target_high"),
        ("target_high", c.target_high <= MAX_VALUE, f"be at most {MAX_VALUE}"),
        ("train_problems", c.train_problems >= 1, "be at least 1"),
        ("eval_problems", c.eval_problems >= 1, "be at least 1"),
        ("seed", c.seed >= 0, "be at least 0"),
    ):
        if not test:
            raise UserError(f"countdown.{name} must {expected}, got {getattr(c, name)}")


def _keys(n: int, c: CountdownConfig, taken: frozenset[Any], rng: np.random.Generator, wanted: int) -> list[tuple[int, ...]]:
    """Distinct keys in random order, less those taken: all there are if that is quick, else at least `wanted` if they come up."""
    if math.comb(c.high - c.low + n, n) * 20 ** (n - 1) <= 4_000_000:
        every = ((nums, _values.__wrapped__(nums)) for nums in combinations_with_replacement(range(c.low, c.high + 1), n))
        found = [(*nums, p) for nums, values in every for p, q in values if q == 1 and c.target_low <= p <= c.target_high]
        return [found[i] for i in rng.permutation(len(found)) if found[i] not in taken]
    keys: dict[tuple[int, ...], None] = {}
    for _ in range(64):
        keys |= dict.fromkeys(k for k in _sampled_keys(n, c, rng, 1 << 16) if k not in taken)
        if len(keys) >= wanted:
            break
    return list(keys)


def _sampled_keys(n: int, c: CountdownConfig, rng: np.random.Generator, rows: int) -> list[tuple[int, ...]]:
    """Keys of those of `rows` random expressions whose value is a target."""
    nums = rng.integers(c.low, c.high + 1, (rows, n))
    p, q, ok = nums, np.ones_like(nums), np.ones(rows, bool)
    for _ in range(n - 1):  # two random values of each row become one
        order = rng.random(p.shape).argsort(axis=1)
        p, q = np.take_along_axis(p, order, 1), np.take_along_axis(q, order, 1)
        (a, b), (s, t), sign = p[:, :2].T, q[:, :2].T, rng.integers(4, size=rows)
        top = np.choose(sign, [a * t + b * s, a * t - b * s, a * b, a * t])
        bottom = np.choose(sign, [s * t, s * t, s * t, s * b])
        ok &= (bottom != 0) & (np.abs(top) < 1 << 30) & (np.abs(bottom) < 1 << 30)  # the next products fit 64 bits
        top, bottom = np.where(ok, top, 0), np.where(ok, bottom, 1)
        p, q = np.column_stack([top, p[:, 2:]]), np.column_stack([bottom, q[:, 2:]])
    target, rest = np.divmod(p[:, 0], q[:, 0])
    ok &= (rest == 0) & (target >= c.target_low) & (target <= c.target_high)
    return list(map(tuple, np.column_stack([np.sort(nums, axis=1), target])[ok].tolist()))


def teacher_answer(problem: Problem, rng: np.random.Generator, *, right: float) -> str:
    """With probability `right` an expression that reaches the target, else one that uses the numbers well and misses it.

    Both are random and have only the brackets they need. Wrong too if the target is out of reach (or, with more than five
    numbers, was not found in 2,000 tries); right if no expression misses it.
    """
    nums, target = tuple(sorted(problem["nums"])), (problem["target"], 1)
    answer = None
    if rng.random() < right:
        answer = _solve(nums, target, rng) if len(nums) <= MAX_SOLVED else _search(nums, target, rng, hit=True, tries=2000)
    return (answer or _search(nums, target, rng, hit=False, tries=100) or _draw(nums, rng)[0])[0]


def _search(nums: tuple[int, ...], target: Ratio, rng: np.random.Generator, *, hit: bool, tries: int) -> Text | None:
    drawn = (_draw(nums, rng) for _ in range(tries))
    return next((text for text, value in drawn if value is not None and (value == target) == hit), None)


def _draw(nums: tuple[int, ...], rng: np.random.Generator) -> tuple[Text, Ratio | None]:
    """A random expression and its value."""
    parts: list[tuple[Text, Ratio | None]] = [((str(n), 3), (n, 1)) for n in nums]
    while len(parts) > 1:
        (left, a), (right, b) = (parts.pop(int(rng.integers(len(parts)))) for _ in range(2))
        sign = "+-*/"[int(rng.integers(4))]
        parts.append((_join(sign, left, right), _apply(sign, a, b)))
    return parts[0]


def _solve(nums: tuple[int, ...], value: Ratio, rng: np.random.Generator) -> Text | None:
    """A random expression of exactly `nums` (sorted) worth `value`, None if there is none."""
    if len(nums) == 1:
        return (str(nums[0]), 3) if value == (nums[0], 1) else None
    if not (ways := _ways(nums, value)):
        return None
    sign, left, a, right, b = ways[int(rng.integers(len(ways)))]
    return _join(sign, _solve(left, a, rng), _solve(right, b, rng))  # type: ignore[arg-type]  # a and b are within reach


def _join(sign: str, left: Text, right: Text) -> Text:
    """a+(b-c) and a*(b/c) need no brackets, a-(b+c) and a/(b*c) do."""
    level = _LEVEL[sign]
    one = left[0] if left[1] >= level else f"({left[0]})"
    other = right[0] if right[1] > level or (right[1] == level and sign in "+*") else f"({right[0]})"
    return f"{one}{sign}{other}", level


@lru_cache(maxsize=1 << 16)
def _ways(nums: tuple[int, ...], value: Ratio) -> tuple[Way, ...]:
    return tuple(way for result, way in _steps(nums) if result == value)


@lru_cache(maxsize=1024)
def _values(nums: tuple[int, ...]) -> tuple[Ratio, ...]:
    """Values of all expressions of exactly `nums` (sorted)."""
    return ((nums[0], 1),) if len(nums) == 1 else tuple(sorted({value for value, _ in _steps(nums)}))


def _steps(nums: tuple[int, ...]) -> Iterator[tuple[Ratio, Way]]:
    """Every last step from values of two parts of `nums`, and what it gives."""
    marks = [f"{m:0{len(nums)}b}" for m in range(1, 2 ** len(nums) - 1)]
    parts = {tuple(tuple(n for n, bit in zip(nums, m, strict=True) if bit == side) for side in "10") for m in marks}
    for left, right in sorted(parts):
        for a, b, sign in product(_values(left), _values(right), "+-*/"):
            if (value := _apply(sign, a, b)) is not None:
                yield value, (sign, left, a, right, b)
