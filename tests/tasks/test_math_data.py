"""Mathematics problems from files, hub data sets and the generator: columns, answers, what is held out, what is refused."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from popo_jax import rules
from popo_jax.data.tokenizer import characters
from popo_jax.task_config import MathConfig, TaskConfig
from popo_jax.tasks import math_data, mathematics, word_problems
from popo_jax.tasks.math_data import last_boxed
from popo_jax.types import UserError
from tests import tiny

Rows = list[dict[str, Any]]


def task(folder: Path, rows: Rows, held_out: Rows | None = None, verifier: str | None = None, **more: Any) -> TaskConfig:
    def write(name: str, rows: Rows) -> str:
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
        return str(folder / name)

    files = {"train_file": write("train.jsonl", rows)}
    files |= {"eval_file": write("eval.jsonl", held_out)} if held_out is not None else {}
    return TaskConfig(name="math", math=MathConfig(**{"eval_problems": 1, **more}), verifier=verifier, **files)


def loaded(c: TaskConfig) -> list[tuple[str, str]]:
    train, held_out = mathematics.load(c)
    return sorted((p["problem"], p["answer"]) for p in [*train, *held_out])


GSM = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = 72 clips.\n#### 1,072"
SHAPES = {
    "DeepScaleR": ({"problem": "p", "answer": r"\frac{1}{2}", "solution": "long"}, r"\frac{1}{2}"),
    "MATH": ({"problem": "p", "solution": r"so \boxed{3}, or \boxed{\frac{1}{\sqrt{2}}}.", "level": "5"}, r"\frac{1}{\sqrt{2}}"),
    "GSM8K": ({"question": "p", "answer": GSM}, "1,072"),
    "Numina": ({"source": "cn", "problem": "p", "solution": r"$\boxed{(1, 2]}$", "messages": []}, "(1, 2]"),
    "numbers": ({"problem": "p", "answer": 42}, "42"),
    "a float": ({"problem": "p", "answer": 0.5}, "0.5"),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_known_shapes_are_found(name: str, kind: str, tmp_path: Path) -> None:
    row, answer = SHAPES[name]
    c = task(tmp_path, [row, {**row, next(k for k in ("problem", "question") if k in row): "q"}])
    if kind == "parquet":
        rows = [json.loads(line) for line in Path(str(c.train_file)).read_text().splitlines()]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
        c = TaskConfig(name="math", train_file=str(tmp_path / "t.parquet"), math=MathConfig(eval_problems=1))
    assert loaded(c) == [("p", answer), ("q", answer)]


def test_columns_by_name(tmp_path: Path) -> None:
    rows = [{"q": f"p{i}", "gold": str(i), "problem": "x", "answer": "y"} for i in range(3)]
    assert loaded(task(tmp_path, rows, problem_column="q", answer_column="gold")) == [("p0", "0"), ("p1", "1"), ("p2", "2")]
    assert loaded(task(tmp_path, rows, problem_column="q")) == [("p0", "y"), ("p1", "y"), ("p2", "y")]
    with pytest.raises(UserError, match=r"train\.jsonl must have columns qq and answer, .*found q, gold, problem, answer"):
        loaded(task(tmp_path, rows, problem_column="qq"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "p", "answer": "1"}], "must have columns problem and answer, problem and solution, question and answer"),
        ([{"problem": "p", "answer": "1"}, {"problem": "p"}], "line 2: column answer is missing or empty"),
        ([{"problem": "p", "answer": None}], "line 1: column answer is missing or empty"),
        ([{"problem": " ", "answer": "1"}], "line 1: problem must be a text that is not blank, got ' '"),
        ([{"problem": 3, "answer": "1"}], "line 1: problem must be a text that is not blank, got 3"),
        ([{"problem": "p", "answer": [1]}], "line 1: answer must be text or a number, got [1]"),
        ([{"problem": "p", "answer": " "}], "line 1: answer must be an answer that is not blank"),
        ([{"problem": "p", "solution": "it is 3"}], r"line 1: solution must have its answer in \boxed{}, got 'it is 3'"),
        (
            [{"problem": "a", "answer": "1"}, {"problem": "p", "answer": r"\boxed{ }"}],
            "line 2: answer must be an answer that is not blank",
        ),
        (
            [{"problem": "a", "answer": "1"}, {"problem": "p", "answer": r"\text{ }"}],
            r"line 2: the answer must be one that math-verify parses, got '\\text{ }'",
        ),
        ([{"problem": "p", "answer": "1"}], "math.eval_problems must leave a problem of"),
    ],
    ids=str,
)
def test_bad_rows_are_told_with_their_place(rows: Rows, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as e:
        mathematics.load(task(tmp_path, rows))
    assert "train.jsonl" in str(e.value)


def test_a_users_verifier_may_have_answers_of_its_own_kind(tmp_path: Path) -> None:
    rows = [{"problem": f"p{i}", "answer": r"\text{ }"} for i in range(2)]
    assert len(loaded(task(tmp_path, rows, verifier="mine:grade"))) == 2


def test_an_answer_is_parsed_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"problem": f"p{i}", "answer": a} for i, a in enumerate(["x+7", "x+7", "3", "-1,000", "2/3", r"\frac{2}{3}"])]
    loaded(task(tmp_path, rows))
    monkeypatch.setattr("popo_jax.tasks.pool.Pool", None)
    assert len(loaded(task(tmp_path, rows))) == 6


@pytest.mark.parametrize("answer", ["3", "-17", "3.25", "2/3", r"\frac{2}{3}", r"-\dfrac{2}{3}", "1,234", "-12,345,678"])
def test_answers_that_pass_unparsed_do_parse(answer: str) -> None:
    assert math_data._PLAIN.fullmatch(answer)
    assert mathematics.parses(math_data.delimited(answer)).correct == 1


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{3}", "3"),
        (r"\boxed{3} and \fbox{4}", "4"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{3", None),
        ("3", None),
        (r"\boxed{}", ""),
        ("\\boxed{" * 10_000, None),
    ],
)
def test_the_last_box(text: str, inside: str | None) -> None:
    assert last_boxed(text) == inside


def many(n: int) -> Rows:
    return [{"problem": f"p{i % (n - 5)}", "answer": str(i % (n - 5))} for i in range(n)]


def test_held_out_problems_are_split_off_by_hash_and_never_shared(tmp_path: Path) -> None:
    train, held_out = mathematics.load(task(tmp_path, many(205), eval_problems=40))
    ids = [{mathematics.problem_id(p) for p in side} for side in (train, held_out)]
    assert len(held_out) == len(ids[1]) == 40 and not ids[0] & ids[1] and len(ids[0] | ids[1]) == 200
    again = mathematics.load(task(tmp_path, many(205)[::-1], eval_problems=40))
    assert {mathematics.problem_id(p) for p in again[1]} == ids[1]  # whatever the order of the file
    fewer = mathematics.load(task(tmp_path, many(205), eval_problems=20))
    assert {mathematics.problem_id(p) for p in fewer[1]} < ids[1]
    other = mathematics.load(task(tmp_path, many(205), eval_problems=40, seed=1))
    assert {mathematics.problem_id(p) for p in other[1]} != ids[1]
    assert [p["problem"] for p in train] == [p["problem"] for p in many(205) if p["problem"] in {q["problem"] for q in train}]


def test_two_files_must_not_share(tmp_path: Path) -> None:
    rows = [{"problem": f"p{i}", "answer": "1"} for i in range(6)]
    train, held_out = mathematics.load(task(tmp_path, rows[:4], rows[4:]))
    assert (len(train), len(held_out)) == (4, 2)
    with pytest.raises(UserError, match=r"eval\.jsonl must hold no problem of .*train\.jsonl, got 2 of 4 in both"):
        mathematics.load(task(tmp_path, rows[:4], rows[2:]))


def test_the_instruction_stands_below_the_problem(tmp_path: Path) -> None:
    rows = [{"problem": "p", "answer": "1"}, {"problem": "q", "answer": "1"}]
    for text, prompt in (("Box it.", "p\nBox it."), ("", "p")):
        train, held_out = mathematics.load(task(tmp_path, rows, instruction=text))
        assert prompt in {mathematics.prompt_text(p) for p in [*train, *held_out]}
    assert MathConfig().instruction == r"Please reason step by step, and put your final answer within \boxed{}."


# Data sets of the hub


def with_datasets(monkeypatch: pytest.MonkeyPatch, load_dataset: Callable[..., Any] | None) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None if load_dataset is None else SimpleNamespace(load_dataset=load_dataset))


def test_a_hub_data_set_is_asked_for_by_name_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: Any, split: str) -> Rows:
        asked.append((*args, split))
        return [{"question": f"{split} {i}", "answer": f"#### {i}"} for i in range(4)]

    with_datasets(monkeypatch, load_dataset)
    c = MathConfig(dataset="openai/gsm8k", dataset_name="main", eval_split="test")
    train, held_out = mathematics.load(TaskConfig(name="math", math=c))
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert [p["problem"] for p in held_out] == [f"test {i}" for i in range(4)] and train[3]["answer"] == "3"
    train, held_out = mathematics.load(TaskConfig(name="math", math=MathConfig(dataset="openai/gsm8k", eval_problems=1)))
    assert (len(train), len(held_out)) == (3, 1)


def test_a_data_set_that_cannot_be_had_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> Rows:
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    c = TaskConfig(name="math", math=MathConfig(dataset="a/b", eval_problems=1))
    with_datasets(monkeypatch, load_dataset)
    with pytest.raises(UserError, match=r"^data set a/b \(train\) must be .* load, got ConnectionError: Couldn't reach the Hub$"):
        mathematics.load(c)
    with_datasets(monkeypatch, lambda *_, **__: [])
    with pytest.raises(UserError, match=r"data set a/b \(train\) must hold at least one problem"):
        mathematics.load(c)
    with_datasets(monkeypatch, lambda *_, **__: [{"problem": "p", "answer": "1"}, {"problem": "q", "answer": r"\text{ }"}])
    with pytest.raises(UserError, match=r"data set a/b \(train\), row 2: the answer must be one .* parses, got '\\\\text{ }'"):
        mathematics.load(c)
    with_datasets(monkeypatch, None)
    with pytest.raises(UserError, match=r"math\.dataset needs the datasets library, got none: pip install 'popo-jax\[data\]'"):
        mathematics.load(c)


def test_a_local_folder_through_the_real_library(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps({"problem": f"p{i}", "answer": i}) + "\n" for i in range(5)))
    c = TaskConfig(name="math", math=MathConfig(dataset=str(tmp_path / "set"), eval_problems=2))
    train, held_out = mathematics.load(c)
    assert (len(train), len(held_out)) == (3, 2)
    assert {p["answer"] for p in [*train, *held_out]} == set("01234")


# Generated word problems

WORDS = MathConfig(instruction="")


def value(expression: str) -> int:
    """By hand: a sum of signed products, then the steps in turn, as told in words."""
    first, *rest = re.findall(r"[-+*]?\d+", expression)
    total = int(first)
    for part in rest:
        sign, n = part[0], int(part[1:])
        total = {"+": total + n, "-": total - n, "*": total * n}[sign]
    return total


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("high", [2, 20, 99])
def test_generated_problems_are_short_right_and_disjoint(steps: int, high: int) -> None:
    few = {"train_problems": 500, "eval_problems": 3 if steps == 1 and high == 2 else 20}
    train, held_out = word_problems.generate(MathConfig(steps=steps, high=high, **few))
    assert (len(train), len(held_out)) == (500, few["eval_problems"])
    assert not {p["expression"] for p in train} & {p["expression"] for p in held_out}
    for p in [*train, *held_out]:
        assert p["problem"].isascii() and len(p["problem"]) <= 64, p
        assert p["answer"] == str(value(p["expression"])) and int(p["answer"]) >= 0, p
        assert len(re.findall(r"[-+*]", p["expression"])) == steps, p
        words = sorted(int(n) for n in re.findall(r"\d+", p["problem"])) + [2] * p["problem"].count("doubles")
        assert sorted(words) == sorted(int(n) for n in re.findall(r"\d+", p["expression"])), p
        assert p["problem"].count("loses") + p["problem"].count("sells") + p["problem"].count("eats") == p["expression"].count(
            "-"
        )


def test_the_generator_varies_and_repeats_by_seed() -> None:
    a, b, other = (word_problems.generate(MathConfig(seed=s, train_problems=200)) for s in (0, 0, 1))
    assert a == b and a != other
    assert len({p["problem"] for p in a[0]}) > 150 and len({p["answer"] for p in a[0]}) > 30
    more = word_problems.generate(MathConfig(train_problems=400))
    assert [p["expression"] for p in more[1]] == [p["expression"] for p in a[1]]


def test_too_few_expressions_are_told() -> None:
    with pytest.raises(UserError, match=r"must leave problems to train on, got 512 of \d+ expressions of 1 steps"):
        word_problems.generate(MathConfig(steps=1, high=2))


def test_generated_problems_are_the_default_and_fit_the_character_tokenizer() -> None:
    train, _ = mathematics.load(TaskConfig(name="math", math=WORDS))
    assert len(train) == 20000 and train[0].keys() == {"problem", "answer", "expression", "work", "instruction"}
    assert max(map(len, characters().encode_all([mathematics.prompt_text(p) for p in train[:500]]))) <= 64


WORK = [
    (("7", "-3"), 0, 0, "7-3=4", 4),
    (("7", "-3", "+5"), 0, 0, "7-3=4\n4+5=9", 9),
    (("3", "*4", "-12", "*2"), 0, 0, "3*4=12\n12-12=0\n0*2=0", 0),
    (("7", "-3", "+5"), 2, 0, "7-3=6\n6+5=11", 11),  # the slip goes on
    (("7", "-3", "+5"), -10, 1, "7-3=4\n4+5=-1", -1),
    (("7", "-9", "*2"), 0, 0, "7-9=-2\n-2*2=-4", -4),
]


@pytest.mark.parametrize(("work", "slip", "at", "lines", "result"), WORK)
def test_problems_are_worked_out_from_left_to_right(work: tuple[str, ...], slip: int, at: int, lines: str, result: int) -> None:
    assert word_problems.worked(work, slip=slip, at=at) == (lines, result)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_teacher_works_a_generated_problem_out_and_slips_in_any_step(steps: int) -> None:
    train, _ = mathematics.load(TaskConfig(name="math", math=MathConfig(steps=steps, eval_problems=20, train_problems=300)))
    rng, slipped = np.random.default_rng(0), set()
    for p in train:
        right, wrong = (mathematics.teacher_answer(p, rng, right=r).split("\n") for r in (1.0, 0.0))
        assert right == [*word_problems.worked(p["work"])[0].split("\n"), f"\\boxed{{{p['answer']}}}"]
        assert len(wrong) == steps + 1 and wrong[-1] != right[-1]
        assert wrong[-1] == f"\\boxed{{{wrong[-2].partition('=')[2]}}}"  # what it worked out is what it answers
        false = [i for i, line in enumerate(wrong[:-1]) if value(line.partition("=")[0]) != int(line.partition("=")[2])]
        assert len(false) == 1
        slipped.add(false[0])
    assert slipped == set(range(steps))


# Settings


def unread(task: dict[str, Any]) -> set[str]:
    c = tiny.config(tasks=[{"name": "math"} | task])
    return {k.removeprefix("tasks.0.math.") for k in rules.unread(c) if k.startswith("tasks.0.math")}


def test_which_settings_are_read() -> None:
    generated, hub = {"train_problems", "steps", "high"}, {"dataset_name", "train_split", "eval_split"}
    assert unread({}) == hub | {"problem_column", "answer_column"}
    assert unread({"train_file": "a"}) == hub | generated
    assert unread({"train_file": "a", "eval_file": "b"}) == hub | generated | {"eval_problems", "seed"}
    assert unread({"math": {"dataset": "a/b"}}) == generated
    assert unread({"math": {"dataset": "a/b", "eval_split": "test"}}) == generated | {"eval_problems", "seed"}
    assert unread({"train_file": "a", "math": {"dataset": "a/b"}}) == generated | {"train_split"}
    assert "verifier" in rules.unread(tiny.config()) and "tasks.0.math" in rules.unread(tiny.config())
    assert "verifier" not in rules.unread(tiny.config(tasks=[{"name": "math"}]))
    assert "verifier" not in rules.unread(tiny.config(tasks=[{"verifier": "a:b"}]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"math": {"steps": 4}}, "tasks.0.math.steps must lie between 1 and 3, got 4"),
        ({"math": {"high": 100}}, "tasks.0.math.high must lie between 2 and 99, got 100"),
        ({"math": {"eval_problems": 0}}, "tasks.0.math.eval_problems must be at least 1, got 0"),
        ({"math": {"train_problems": 0}}, "tasks.0.math.train_problems must be at least 1, got 0"),
        ({"math": {"seed": -1}}, "tasks.0.math.seed must be at least 0, got -1"),
        ({"eval_file": "e"}, "tasks.0.train_file or math.dataset must be given beside eval_file, got neither beside e"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        tiny.config(tasks=[{"name": "math"} | settings])
