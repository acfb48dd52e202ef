"""The Countdown verifier: every reason, hostile text, exact values against Python's own parser, bounded time."""

from __future__ import annotations

import ast
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest

from popo_jax.tasks import countdown
from popo_jax.types import Verdict

SCORES = {
    "right": (1.0, 1.0),
    "wrong value": (0.1, 0.0),
    "wrong numbers": (0.1, 0.0),
    "no answer": (0.0, 0.0),
    "malformed": (0.0, 0.0),
}
LIMIT = 0.010
"""Seconds of thread time a verdict may take."""


def nested(depth: int, inside: str = "3+5+7") -> str:
    return "(" * depth + inside + ")" * depth


# name: (response, reason), for the numbers 3 5 7 and the target 56
TABLE = {
    "right": ("(3+5)*7", "right"),
    "right, blanks between and around": (" \t( 3 +\t5 ) * 7 \r\n", "right"),
    "right, needless brackets": ("((((3)+5))*(7))", "right"),
    "right, numbers in another order": ("7*(5+3)", "right"),
    "left to right: 3-5 comes first": ("7-3-5", "wrong value"),
    "precedence: 5*7 comes first": ("3+5*7", "wrong value"),
    "a number missing": ("(3+5)", "wrong numbers"),
    "a number twice": ("(3+5)*7*7/7", "wrong numbers"),
    "the target itself": ("56", "wrong numbers"),
    "another number of the same value": ("(3+5)*(4+3)", "wrong numbers"),
    "digits joined": ("35*7", "wrong numbers"),
    "division by zero, right numbers": ("3/(5-5)+7", "wrong numbers"),
    "wrong numbers worth the target": ("8*7", "wrong numbers"),
    "empty": ("", "no answer"),
    "blank": (" \n\t ", "no answer"),
    "tag": ("<answer>(3+5)*7</answer>", "right"),
    "tag with blanks and line breaks inside": ("<answer>\n (3+5)*7 \n</answer>", "right"),
    "tag after thoughts": ("<think>3+5=8</think> so <answer>(3+5)*7</answer> <|im_end|>", "right"),
    "last pair counts, right": ("<answer>3+5+7</answer><answer>(3+5)*7</answer>", "right"),
    "last pair counts, wrong": ("<answer>(3+5)*7</answer><answer>3+5+7</answer>", "wrong value"),
    "a pair, then an open tag": ("<answer>(3+5)*7</answer><answer>3", "right"),
    "a pair, then a stray closing tag": ("<answer>(3+5)*7</answer></answer>", "right"),
    "tag in tag": ("<answer>1<answer>(3+5)*7</answer>", "right"),
    "bare after thoughts": ("<think>3+5=8\nso</think>\n(3+5)*7", "right"),
    "thoughts that the prompt began": ("so 3+5</think>(3+5)*7", "right"),
    "thoughts never closed": ("<think>(3+5)*7", "no answer"),
    "tag never closed": ("<answer>(3+5)*7", "no answer"),
    "closed before it opens": ("</answer>(3+5)*7<answer>", "no answer"),
    "empty tag": ("<answer></answer>", "no answer"),
    "blank tag": ("<answer> \n</answer>", "no answer"),
    "closing tag only": ("(3+5)*7</answer>", "malformed"),
    "tag in capitals": ("<ANSWER>(3+5)*7</ANSWER>", "malformed"),
    "tag with a blank": ("< answer>(3+5)*7</answer>", "malformed"),
    "words": ("the answer is (3+5)*7", "malformed"),
    "equation": ("(3+5)*7=56", "malformed"),
    "equation, spaced": ("(3+5)*7 = 56", "malformed"),
    "power": ("3**5**7", "malformed"),
    "tower": ("9**9**9", "malformed"),
    "floor division": ("3//5*7", "malformed"),
    "remainder": ("3%5*7", "malformed"),
    "shift": ("1<<10**10", "malformed"),
    "caret": ("3^5*7", "malformed"),
    "sign in front": ("-3+5*7", "malformed"),
    "plus in front": ("+3+5*7", "malformed"),
    "sign in the middle": ("5*-3+7", "malformed"),
    "sign after a bracket": ("(-3)+5*7", "malformed"),
    "two signs": ("3--5+7", "malformed"),
    "operator at the end": ("3+5+", "malformed"),
    "operator alone": ("*", "malformed"),
    "empty brackets": ("()", "malformed"),
    "empty brackets, later": ("3+5*7*()", "malformed"),
    "bracket left open": ("(3+5*7", "malformed"),
    "bracket closed twice": ("(3+5))*7", "malformed"),
    "brackets the wrong way round": (")3+5*7(", "malformed"),
    "brackets that close and open": ("3)+(5*7", "malformed"),
    "no operator before a bracket": ("7(3+5)", "malformed"),
    "no operator after a bracket": ("(3+5)7", "malformed"),
    "no operator between brackets": ("(3+5)(7)", "malformed"),
    "no operator between numbers": ("3 5 7", "malformed"),
    "square brackets": ("[3+5]*7", "malformed"),
    "decimal point": ("3.0+5*7", "malformed"),
    "leading dot": (".3+5*7", "malformed"),
    "exponent": ("3e0+5*7", "malformed"),
    "hexadecimal": ("0x3+5*7", "malformed"),
    "underscore": ("3+5*7_", "malformed"),
    "underscore in a number": ("1_0+5", "malformed"),
    "leading zero": ("(03+5)*7", "malformed"),
    "zeros": ("00", "malformed"),
    "comma": ("(3+5)*7,", "malformed"),
    "comment": ("(3+5)*7 # 56", "malformed"),
    "two lines": ("(3+5)\n*7", "malformed"),
    "call": ("__import__('os').system('exit')", "malformed"),
    "lambda": ("(lambda: 56)()", "malformed"),
    "fullwidth digits": ("\uff08\uff13\uff0b\uff15\uff09\uff0a\uff17", "malformed"),
    "fullwidth digit": ("(\uff13+5)*7", "malformed"),
    "arabic-indic digits": ("(\u0663+\u0665)*\u0667", "malformed"),
    "superscript": ("3\u00b2+5*7", "malformed"),
    "times sign": ("(3+5)\u00d77", "malformed"),
    "minus sign": ("3\u22125+7", "malformed"),
    "division slash": ("3\u22155*7", "malformed"),
    "no-break space": ("(3+5)\u00a0*7", "malformed"),
    "no-break space around": ("\u00a0(3+5)*7\u00a0", "malformed"),
    "zero-width space": ("(3+5)\u200b*7", "malformed"),
    "right to left": ("\u202e7*(5+3)\u202c", "malformed"),
    "byte order mark": ("\ufeff(3+5)*7", "malformed"),
    "NUL": ("(3+5)*7\x00", "malformed"),
    "lone surrogate": ("\ud800(3+5)*7", "malformed"),
    "lone surrogates in a tag": ("<answer>\udfff\ud800</answer>", "malformed"),
    "emoji": ("\U0001f600", "malformed"),
    "vertical tab": ("3\x0b+5*7", "malformed"),
    "nine digits": ("999999999", "wrong numbers"),
    "ten digits": ("1000000000", "malformed"),
    "digits without end": ("9" * 10**5, "malformed"),
    "digits within the length": ("9" * 256, "malformed"),
    "32 brackets": (nested(32), "wrong value"),
    "33 brackets": (nested(33), "malformed"),
    "brackets side by side are not deep": ("+".join(["(3)"] * 40), "wrong numbers"),
    "10^5 brackets": (nested(10**5), "malformed"),
    "10^5 opening brackets": ("(" * 10**5, "malformed"),
    "10^5 closing brackets": (")" * 10**5, "malformed"),
    "256 characters": ("(3+5)" + " " * 249 + "*7", "right"),
    "257 characters": ("(3+5)" + " " * 250 + "*7", "malformed"),
    "a long sum": ("1" + "+1" * 127, "wrong numbers"),
    "a long product": ("*".join(["999999999"] * 25), "wrong numbers"),
    "a long quotient": ("/".join(["999999999"] * 25), "wrong numbers"),
    "blanks around, within the limit": (" " * 65000 + "(3+5)*7", "right"),
    "10^6 blanks": (" " * 10**6, "malformed"),
    "10^6 opening tags": ("<answer>" * 10**5, "no answer"),
    "10^6 halves of a tag": ("<answer" * 10**5 + "</answer" * 10**5, "malformed"),
    "10^6 characters before the answer": ("x" * 10**6 + "<answer>(3+5)*7</answer>", "right"),
}


@pytest.mark.parametrize("name", TABLE)
def test_table(name: str) -> None:
    response, reason = TABLE[name]
    assert countdown.grade(response, nums=[3, 5, 7], target=56) == Verdict(*SCORES[reason], reason)


@pytest.mark.parametrize(
    ("response", "nums", "target", "reason"),
    [
        ("8/(3-8/3)", [3, 3, 8, 8], 24, "right"),
        ("1/3+2/3", [1, 2, 3, 3], 1, "right"),
        ("1/3*3", [1, 3, 3], 1, "right"),
        ("7/2", [2, 7], 3, "wrong value"),
        ("7/2", [2, 7], 7, "wrong value"),
        ("2-7", [2, 7], -5, "right"),
        ("2/(3-5)*7", [2, 3, 5, 7], -7, "right"),
        ("3/(5-5)", [3, 5, 5], 0, "wrong value"),
        ("0*(3/(5-5))", [0, 3, 5, 5], 0, "wrong value"),
        ("0/5", [0, 5], 0, "right"),
        ("0/0", [0, 0], 0, "wrong value"),
        ("16-8/4", [4, 8, 16], 14, "right"),
        ("100000000*10/3*3", [3, 3, 10, 10**8], 10**9, "right"),
        ("999999999*999999999/999999998", [999999999, 999999999, 999999998], 1000000000, "wrong value"),
        ("7", [7], 7, "right"),
        ("7", [], 7, "wrong numbers"),
    ],
)
def test_values_are_exact(response: str, nums: list[int], target: int, reason: str) -> None:
    assert countdown.grade(response, nums=nums, target=target).reason == reason


@pytest.mark.parametrize("nums", [[7, 3, 5], (3, 5, 7), np.array([5, 7, 3]), np.array([5, 7, 3], np.int8)], ids=repr)
def test_nums_of_any_kind_and_order(nums: object) -> None:
    assert countdown.grade("(3+5)*7", nums=nums, target=np.int64(56)).reason == "right"  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", [{"nums": [3.5, 5, 7], "target": 56}, {"nums": [3, 5, 7], "target": 56.5}], ids=repr)
def test_fields_that_are_no_integers_are_a_bug_not_a_verdict(fields: dict) -> None:
    with pytest.raises(TypeError):
        countdown.grade("(3+5)*7", **fields)


# An evaluation of its own: Python's parser, walked with Fraction.

OPERATORS: dict[type, Callable] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def expected(text: str, nums: list[int], target: int) -> str:
    """The reason by way of `ast`, for short text without the characters that Python reads and Countdown does not."""
    if not text.strip():
        return "no answer"
    if re.search(r"(?<!\d)00", text):
        return "malformed"  # Python takes 00 for 0, and refuses 03 like we do
    try:
        numbers, value = walk(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError):
        return "malformed"
    if sorted(numbers) != sorted(nums):
        return "wrong numbers"
    return "right" if value == target else "wrong value"


def walk(node: ast.expr) -> tuple[list[int], Fraction | None]:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return [node.value], Fraction(node.value)
    if not isinstance(node, ast.BinOp) or type(node.op) not in OPERATORS:
        raise TypeError
    (left, a), (right, b) = walk(node.left), walk(node.right)
    undefined = a is None or b is None or (isinstance(node.op, ast.Div) and b == 0)
    return left + right, None if undefined else OPERATORS[type(node.op)](a, b)


def expression(rng: random.Random, nums: list[int]) -> str:
    """Random, of exactly `nums`, with needless brackets and blanks now and then."""
    parts = [str(n) for n in nums]
    while len(parts) > 1:
        left, right = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        blank = rng.choice(["", "", " "])
        text = f"{left}{blank}{rng.choice('+-*/')}{blank}{right}"
        parts.append(f"({text})" if rng.random() < 0.5 else text)
    return parts[0]


def test_agrees_with_pythons_parser_on_random_expressions() -> None:
    rng, seen = random.Random(0), dict.fromkeys(SCORES, 0)
    for _ in range(4000):
        nums = [rng.randint(0, 9) for _ in range(rng.randint(1, 6))]
        text = expression(rng, nums)
        if rng.random() < 0.3:  # one character put in, taken out or changed
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(["", rng.choice("0123456789+-*/() ")]) + text[at + rng.randint(0, 1) :]
        _, value = walk_or_none(text)
        target = int(value) if value is not None and rng.random() < 0.7 else rng.randint(-20, 99)
        reason = countdown.grade(text, nums=nums, target=target).reason
        assert reason == expected(text, nums, target), (text, nums, target)
        seen[reason] += 1
    assert min(seen[r] for r in ("right", "wrong value", "wrong numbers", "malformed")) > 200, seen


def walk_or_none(text: str) -> tuple[list[int], Fraction | None]:
    try:
        return walk(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError):
        return [], None


def test_agrees_with_pythons_parser_on_random_characters() -> None:
    rng, well_formed = random.Random(1), 0
    for _ in range(20000):
        text = "".join(rng.choices("357+-*/() ", k=rng.randint(1, 9)))
        reason = countdown.grade(text, nums=[3, 5], target=15).reason
        assert reason == expected(text, [3, 5], 15), text
        well_formed += reason not in ("malformed", "no answer")
    assert well_formed > 300


def hostile(seed: int) -> Iterator[str]:
    """Random text without end: alphabets near the grammar and far from it, long and short, the table's rows cut and glued."""
    rng = random.Random(seed)
    pieces = [text for text, _ in TABLE.values()]
    tags = ["<answer>", "</answer>", "<answer", "answer>", "</", "\n"]
    while True:
        kind = rng.randrange(6)
        n = int(10 ** rng.uniform(0, 3))
        if kind == 0:
            yield "".join(rng.choices("0123456789+-*/() ", k=n))
        elif kind == 1:
            yield "".join(map(chr, rng.choices(range(0x110000), k=min(n, 100))))  # surrogates among them
        elif kind == 2:
            a, b = rng.choice(pieces), rng.choice(pieces)
            yield a[: rng.randint(0, len(a))] + b[rng.randint(0, len(b)) :]
        elif kind == 3:
            yield "".join(rng.choices([*tags, "(3+5)*7", "3", " ", "\ud800"], k=n))
        elif kind == 4:
            yield rng.choice(["(", ")", "-", "9", "/", "1/", "(1", "<answer>", "<answer>(", "1+", "9*"]) * n
        else:
            yield f"<answer>{expression(rng, [rng.randint(0, 10**9 - 1) for _ in range(rng.randint(1, 25))])}</answer>"


def slowest(n: int, seed: int) -> float:
    """Seconds of thread time of the slowest verdict; one over the limit is tried twice more: no blame for a cold cache."""
    rng, worst = random.Random(seed), 0.0
    for _, text in zip(range(n), hostile(seed), strict=False):
        nums = [rng.randint(1, 99) for _ in range(rng.randint(1, 6))]
        took = math.inf
        for _ in range(3):
            start = time.thread_time()
            verdict = countdown.grade(text, nums=nums, target=rng.randint(-5, 99))
            took = min(took, time.thread_time() - start)
            if took < LIMIT:
                break
        assert (verdict.score, verdict.correct) == SCORES[verdict.reason]
        worst = max(worst, took)
    return worst


def test_100000_hostile_strings() -> None:
    assert slowest(100_000, seed=0) < LIMIT


@pytest.mark.parametrize(
    "text",
    [
        "<answer" * 142857,
        "</answer" * 125000,
        "<answer></answer>" * 58823,
        "<answer>" + " " * 10**6 + "</answer>",
        " \t\r\n" * 250000,
        "\U0001f600" + "<answer>1</answer" * 58823,
        "\U0001f600" * 10**6,
        "1+" * 500000,
        "(" * 10**6,
        "9" * 10**6,
    ],
    ids=lambda t: f"{t[:8]!a}",
)
def test_a_million_characters_within_the_limit(text: str) -> None:
    times = []
    for _ in range(3):
        start = time.thread_time()
        countdown.grade(text, nums=[3, 5, 7], target=56)
        times.append(time.thread_time() - start)
    assert min(times) < LIMIT
