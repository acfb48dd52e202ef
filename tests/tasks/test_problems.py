"""Generated Countdown problems, what is held out, and the teacher's answers."""

from __future__ import annotations

import ast
import hashlib
import itertools
import re
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from popo_jax.config import from_dict
from popo_jax.rules import resolve
from popo_jax.task_config import CountdownConfig, TaskConfig
from popo_jax.tasks import countdown
from popo_jax.types import UserError

Problem = dict


def values(nums: tuple[int, ...]) -> set[Fraction]:
    """Brute force: every order, every two neighbours joined first, every operator."""
    return set().union(*(joined(tuple(map(Fraction, order))) for order in set(itertools.permutations(nums))))


def joined(row: tuple[Fraction, ...]) -> set[Fraction]:
    if len(row) == 1:
        return {row[0]}
    out: set[Fraction] = set()
    for i in range(len(row) - 1):
        a, b = row[i], row[i + 1]
        for x in [a + b, a - b, a * b] + ([a / b] if b else []):
            out |= joined((*row[:i], x, *row[i + 2 :]))
    return out


def keys(problems: list[Problem]) -> Counter:
    return Counter((tuple(sorted(p["nums"])), p["target"]) for p in problems)


DEFAULT = CountdownConfig()
CONFIGS = {
    "default": DEFAULT,
    "four numbers": CountdownConfig(numbers=(4,), train_problems=2000),
    "a mix": CountdownConfig(numbers=(3, 4), train_problems=2001, eval_problems=101),
    "large numbers, drawn at random": CountdownConfig(numbers=(3, 4), high=99, train_problems=2000),
    "targets below zero": CountdownConfig(target_low=-20, target_high=-1, train_problems=500, eval_problems=64),
    "numbers of nine digits": CountdownConfig(
        low=10**8, high=10**9 - 1, target_high=10**9 - 1, train_problems=500, eval_problems=64
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_problems_are_solvable_in_range_and_disjoint(name: str) -> None:
    c = CONFIGS[name]
    train, held_out = countdown.generate(c)
    assert len(train) == c.train_problems and len(held_out) == c.eval_problems
    assert max(keys(held_out).values()) == 1
    assert not keys(train).keys() & keys(held_out).keys()
    for p in [*train, *held_out]:
        assert p.keys() == {"nums", "target"} and all(type(x) is int for x in [*p["nums"], p["target"]])
        assert all(c.low <= n <= c.high for n in p["nums"]) and c.target_low <= p["target"] <= c.target_high
    for p in [*train[:40], *held_out[:40]]:
        assert p["target"] in values(tuple(p["nums"])), p


def test_the_default_space_is_all_there_is() -> None:
    every = {
        (nums, int(v))
        for nums in itertools.combinations_with_replacement(range(1, 10), 3)
        for v in values(nums)
        if v.denominator == 1 and 1 <= v <= 99
    }
    train, held_out = countdown.generate(DEFAULT)
    assert keys(train).keys() | keys(held_out).keys() == every
    times = keys(train).values()
    assert max(times) - min(times) == 1  # 20,000 problems of fewer keys: each comes round equally often


def test_numbers_have_equal_shares() -> None:
    train, held_out = countdown.generate(CONFIGS["a mix"])
    assert Counter(len(p["nums"]) for p in train) == {3: 1001, 4: 1000}
    assert Counter(len(p["nums"]) for p in held_out) == {3: 51, 4: 50}
    assert {len(p["nums"]) for p in train[:20]} == {3, 4}  # mixed, not one after the other


def test_a_number_listed_twice_weighs_double_and_stays_disjoint() -> None:
    train, held_out = countdown.generate(CountdownConfig(numbers=(3, 4, 4), train_problems=900, eval_problems=90))
    assert Counter(len(p["nums"]) for p in train) == {3: 300, 4: 600}
    assert not keys(train).keys() & keys(held_out).keys()


def test_the_order_of_numbers_is_shuffled() -> None:
    train, _ = countdown.generate(DEFAULT)
    ranks = Counter(tuple(np.argsort(p["nums"]).tolist()) for p in train if len(set(p["nums"])) == 3)
    assert len(ranks) == 6 and min(ranks.values()) > 0.8 * max(ranks.values())


@pytest.mark.parametrize("name", ["default", "large numbers, drawn at random"])
def test_the_seed_decides(name: str) -> None:
    c = CONFIGS[name]
    assert countdown.generate(c) == countdown.generate(c)
    other = countdown.generate(CountdownConfig(**{**vars(c), "seed": 1}))
    assert other[0] != countdown.generate(c)[0] and keys(other[1]) != keys(countdown.generate(c)[1])


@pytest.mark.parametrize("name", ["default", "large numbers, drawn at random"])
def test_held_out_stays_when_training_grows(name: str) -> None:
    c = CONFIGS[name]
    more = countdown.generate(CountdownConfig(**{**vars(c), "train_problems": c.train_problems // 2}))
    assert keys(more[1]) == keys(countdown.generate(c)[1])


def test_taken_keys_are_on_neither_side() -> None:
    for name in ("default", "large numbers, drawn at random"):
        c = CONFIGS[name]
        taken = frozenset(map(countdown.key, countdown.generate(c)[1]))
        train, held_out = countdown.generate(c, taken)
        assert len(held_out) == c.eval_problems and len(train) == c.train_problems
        assert not taken & set(map(countdown.key, [*train, *held_out]))


def test_generation_is_quick() -> None:
    for name in ("default", "four numbers", "large numbers, drawn at random"):
        start = time.thread_time()
        countdown.generate(CountdownConfig(**{**vars(CONFIGS[name]), "train_problems": 20000}))
        assert time.thread_time() - start < 3, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numbers": (1,), "high": 9}, "countdown.eval_problems must leave a problem to train on, got 512 of 9 with 1 numbers"),
        ({"eval_problems": 2144}, "countdown.eval_problems must leave a problem to train on, got 2144 of 2144 with 3 numbers"),
        ({"low": 5, "high": 5, "target_low": 80}, "got 512 of 0 with 3 numbers from 5 to 5 and targets from 80 to 99"),
        ({"numbers": ()}, "countdown.numbers must list whole numbers from 1 to 5, got ()"),
        ({"numbers": (3, 6)}, "countdown.numbers must list"),
        ({"low": 0}, "countdown.low must lie between 1 and countdown.high, got 0"),
        ({"low": 10}, "countdown.low must lie between 1 and countdown.high, got 10"),
        ({"high": 10**9}, "countdown.high must be at most 999999999"),
        ({"target_low": 100}, "countdown.target_low must lie between -999999999 and countdown.target_high, got 100"),
        ({"target_high": 10**9}, "countdown.target_high must be at most 999999999"),
        ({"train_problems": 0}, "countdown.train_problems must be at least 1, got 0"),
        ({"eval_problems": 0}, "countdown.eval_problems must be at least 1, got 0"),
        ({"seed": -1}, "countdown.seed must be at least 0, got -1"),
    ],
    ids=str,
)
def test_settings_out_of_range(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        countdown.generate(CountdownConfig(**change))


def test_one_key_fewer_than_all_can_be_held_out() -> None:
    train, held_out = countdown.generate(CountdownConfig(eval_problems=2143))
    assert len(held_out) == 2143 and len(keys(train)) == 1


def test_prompt_and_fields() -> None:
    p = {"nums": [7, 3, 12], "target": 56, "source": "x"}
    assert countdown.prompt_text(p) == "7 3 12 -> 56:"
    assert countdown.answer_fields(p) == {"nums": (7, 3, 12), "target": 56}
    assert countdown.key(p) == (3, 7, 12, 56)


def test_a_prompt_in_words_changes_what_is_asked_and_no_id(tmp_path) -> None:
    words = "Use {nums}, each once, to make {target}. Answer in <answer> tags: {nums}?"
    config = TaskConfig(countdown=CountdownConfig(prompt=words, train_problems=4, eval_problems=2))
    train, held_out = countdown.load(config)
    plain, _ = countdown.load(TaskConfig(countdown=CountdownConfig(train_problems=4, eval_problems=2)))
    for p, q in zip(train, plain, strict=True):
        nums = " ".join(map(str, p["nums"]))
        assert countdown.prompt_text(p) == f"Use {nums}, each once, to make {p['target']}. Answer in <answer> tags: {nums}?"
        assert countdown.problem_id(p) == countdown.problem_id(q) and countdown.prompt_text(q) == f"{nums} -> {p['target']}:"
    assert all(countdown.prompt_text(p).startswith("Use ") for p in held_out)
    file = tmp_path / "p.jsonl"
    file.write_text('{"nums": [1, 2], "target": 3, "prompt": "not this one"}\n')
    (row,), _ = countdown.load(TaskConfig(train_file=str(file), countdown=CountdownConfig(prompt=words, eval_problems=2)))
    assert countdown.prompt_text(row).startswith("Use 1 2, each once, to make 3.")


def test_a_prompt_without_its_places_is_refused() -> None:
    with pytest.raises(
        UserError, match=re.escape("tasks.0.countdown.prompt must have {nums} and {target} in it, got 'Solve it'")
    ):
        resolve(from_dict({"tasks": [{"name": "countdown", "countdown": {"prompt": "Solve it"}}]}))


def test_problem_id_is_made_from_content() -> None:
    p = {"nums": [7, 3, 12], "target": 56}
    assert countdown.problem_id(p) == "countdown-" + hashlib.sha256(b"7 3 12 -> 56:").hexdigest()[:12]
    assert countdown.problem_id({**p, "extra": 1}) == countdown.problem_id(p)
    others = [{"nums": [3, 7, 12], "target": 56}, {"nums": [7, 31, 2], "target": 56}, {"nums": [7, 3, 12], "target": 57}]
    assert len({countdown.problem_id(q) for q in [p, *others]}) == 4


# The teacher


def answers(problems: list[Problem], right: float, seed: int = 0) -> list[tuple[str, str]]:
    """(answer, its verdict's reason) for each problem."""
    rng = np.random.default_rng(seed)
    texts = [countdown.teacher_answer(p, rng, right=right) for p in problems]
    return [(t, countdown.grade(t, **countdown.answer_fields(p)).reason) for t, p in zip(texts, problems, strict=True)]


@pytest.mark.parametrize("name", ["default", "a mix", "large numbers, drawn at random", "targets below zero"])
def test_teacher_is_always_right_or_always_wrong_as_told(name: str) -> None:
    problems = countdown.generate(CONFIGS[name])[0][:300]
    assert {r for _, r in answers(problems, 1.0)} == {"right"}
    assert {r for _, r in answers(problems, 0.0)} == {"wrong value"}


def test_teacher_is_right_in_its_share() -> None:
    reasons = Counter(r for _, r in answers(countdown.generate(DEFAULT)[0][:6000], 0.33))
    assert reasons.keys() == {"right", "wrong value"}
    assert abs(reasons["right"] / 6000 - 0.33) < 0.025  # four deviations


def test_wrong_answers_have_a_value() -> None:
    p = {"nums": [3, 3, 3], "target": 99}
    texts = {t for t, _ in answers([p] * 500, 0.0)}
    assert "3/(3-3)" not in texts and "3*(3-3)" in texts


def test_teacher_varies_and_repeats_by_seed() -> None:
    p = {"nums": [2, 4, 6], "target": 12}
    assert {t for t, _ in answers([p] * 300, 1.0)} >= {"2+4+6", "6+4+2", "4*6/2", "6/2*4", "6*(4-2)", "6/(2/4)", "(4-2)*6"}
    assert answers([p] * 20, 0.5, seed=3) == answers([p] * 20, 0.5, seed=3)
    assert answers([p] * 20, 0.5, seed=3) != answers([p] * 20, 0.5, seed=4)


def test_brackets_stand_only_where_they_change_the_value() -> None:
    problems = countdown.generate(CONFIGS["four numbers"])[0][:300]
    for text, _ in answers(problems, 0.5):
        assert " " not in text
        for opening in [i for i, ch in enumerate(text) if ch == "("]:
            closing = matching(text, opening)
            bare = text[:opening] + text[opening + 1 : closing] + text[closing + 1 :]
            assert eval_tree(bare) != eval_tree(text), (text, bare)


def matching(text: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise AssertionError(text)


def eval_tree(text: str) -> str:
    """The sum of products that a text spells, numbers kept as symbols: equal only for the same reading, + and * regrouped."""

    def signed(node: ast.expr, low: type, inverse: type) -> list[tuple[bool, str]]:
        if isinstance(node, ast.BinOp) and isinstance(node.op, (low, inverse)):
            right = signed(node.right, low, inverse)
            flip = isinstance(node.op, inverse)
            return signed(node.left, low, inverse) + [(sign != flip, x) for sign, x in right]
        return [(True, spell(node))]

    def spell(node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        assert isinstance(node, ast.BinOp)
        pair = (ast.Add, ast.Sub) if isinstance(node.op, (ast.Add, ast.Sub)) else (ast.Mult, ast.Div)
        return f"{pair[0].__name__}{signed(node, *pair)}"

    return spell(ast.parse(text, mode="eval").body)


def test_out_of_reach_is_answered_wrong_and_never_missed_is_answered_right() -> None:
    assert {r for _, r in answers([{"nums": [1, 1], "target": 50}] * 20, 1.0)} == {"wrong value"}
    assert {r for _, r in answers([{"nums": [7], "target": 7}] * 5, 0.0)} == {"right"}
    assert {r for _, r in answers([{"nums": [0, 0], "target": 0}] * 5, 1.0)} == {"right"}


def test_teacher_of_eight_numbers_stays_quick() -> None:
    p = {"nums": [1, 2, 3, 4, 5, 6, 7, 8], "target": 36}
    start = time.thread_time()
    reasons = Counter(r for _, r in answers([p] * 10, 1.0))
    assert time.thread_time() - start < 3
    assert reasons["right"] >= 5 and reasons.keys() <= {"right", "wrong value"}


def test_twenty_thousand_answers_in_seconds() -> None:
    problems = countdown.generate(DEFAULT)[0]
    start = time.thread_time()
    answers(problems, 0.33)
    assert time.thread_time() - start < 5
