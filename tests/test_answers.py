"""`popo eval --answers FILE`: hand-made files and figures computed by hand; what a file must not hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from popo_jax import answers, cli
from popo_jax.types import UserError

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


HAND = {"a": "1000", "b": "1100", "c": "0000", "d": "1111", "e": "1110"}
"""
problem  n  c  avg@4  pass@1  pass@2                pass@4
a        4  1  1/4    1/4     1 - C(3,2)/C(4,2) = 1 - 3/6 = 1/2   1
b        4  2  1/2    1/2     1 - C(2,2)/C(4,2) = 1 - 1/6 = 5/6   1
c        4  0  0      0       1 - C(4,2)/C(4,2) = 0               0
d        4  4  1      1       1                                   1
e        4  3  3/4    3/4     1 - 0 = 1                           1
mean           1/2    1/2     (3 + 5 + 0 + 6 + 6) / 30 = 2/3      4/5
"""


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_a_file_made_by_hand_from_the_command_line(name, tmp_path, capsys):
    rows = [{"problem": p, "correct": c == "1"} for p, marks in HAND.items() for c in marks]
    rows = rows[::2] + rows[1::2]  # a problem's answers need not stand together
    path = write(tmp_path / name, rows)
    assert cli.main(["eval", "--answers", str(path), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert all(x in said for x in ("avg@4", "50.0 %", "66.7 %", "80.0 %", "5 problems, 20 answers"))
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["results"]["all"]
    by_hand = {"avg@4": 1 / 2, "pass@1": 1 / 2, "pass@2": 2 / 3, "pass@4": 4 / 5}
    assert {k: m["value"] for k, m in found["metrics"].items()} == pytest.approx(by_hand)
    low, high = found["metrics"]["pass@4"]["interval"]
    assert (low, high) == pytest.approx((0.4, 1.0))  # of Binomial(5, 0.8) / 5: P(<= 1) = 0.7 %, P(<= 2) = 5.8 %
    assert cli.main(["eval", "--answers", str(path), "--out", str(tmp_path / "out")]) == 2


def test_uneven_numbers_of_samples(tmp_path, capsys):
    """
    a: 1 0          avg 1/2   pass@1 1/2   pass@2 1
    b: 1 1 0 0 0 0  avg 1/3   pass@1 1/3   pass@2 1 - C(4,2)/C(6,2) = 1 - 6/15 = 3/5
    Each problem counts once: avg 5/12 (not 3/8), pass@2 4/5; k goes up to the fewest samples.
    """
    rows = [{"problem": 1, "correct": x} for x in (1, 0)] + [{"problem": 2, "correct": x} for x in (1, 1, 0, 0, 0, 0)]
    path = write(tmp_path / "x.jsonl", rows)
    m = answers.summary(answers.read(path), None, "x")["all"]["metrics"]
    assert {k: v["value"] for k, v in m.items()} == pytest.approx({"avg@2-6": 5 / 12, "pass@1": 5 / 12, "pass@2": 4 / 5})
    assert cli.main(["eval", "--answers", str(path), "--k", "4"]) == 2
    assert f"error: {path}: --k must be at most 2, the samples of problem '1', got 4\n" == capsys.readouterr().err


def test_chosen_k_and_tasks_apart(tmp_path):
    rows = [
        {"task": t, "problem": "p", "correct": c, "tokens": 3 + c, "truncated": c == 0} for t in "xy" for c in (1, 0, t == "y")
    ]
    found = answers.summary(answers.read(write(tmp_path / "a.jsonl", rows)), [3], "a")
    assert list(found) == ["x", "y", "all tasks"] and list(found["x"]["metrics"]) == ["avg@3", "pass@1", "pass@2", "pass@3"]
    assert [found[t]["metrics"]["avg@3"]["value"] for t in found] == pytest.approx([1 / 3, 2 / 3, 1 / 2])
    assert found["x"]["truncated"] == pytest.approx(2 / 3) and found["x"]["mean_tokens"] == pytest.approx(10 / 3)


def test_answers_without_a_verdict_are_graded(tmp_path):
    texts = [r"so \boxed{\frac{1}{2}}", "it is 0.5", r"\boxed{2}", "no idea"]
    rows = [{"problem": "half", "text": t, "answer": r"\frac{1}{2}"} for t in texts] + [
        {"problem": "two", "text": t, "answer": 2} for t in texts
    ]
    found = answers.summary(answers.read(write(tmp_path / "a.jsonl", rows)), None, "a")["all"]
    assert found["metrics"]["avg@4"]["value"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert found["reasons"] == {"wrong": 3, "right": 3, "no answer": 2}


def test_what_the_verifier_could_not_grade_counts_as_wrong(tmp_path):
    rows = [{"problem": "p", "correct": None, "reason": "verifier error: x"}, {"problem": "p", "correct": True}]
    found = answers.summary(answers.read(write(tmp_path / "a.jsonl", rows)), None, "a")["all"]
    assert found["metrics"]["avg@2"]["value"] == 0.5 and found["verifier_errors"] == 1


GOOD = {"problem": "p", "correct": True}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"correct": True}], "line 1: column problem is missing, found"),
        ([GOOD, {"problem": "p"}], "line 2: column correct is missing"),
        ([{"problem": "p"}], "line 1: expected a column correct, or text and answer; text is missing"),
        ([{"problem": "p", "text": "x"}], "text and answer; answer is missing"),
        ([{"problem": "p", "text": "x", "answer": r"\text{ }"}], "line 1: the answer must be one that math-verify parses"),
        ([{"problem": "p", "text": 3, "answer": "1"}], "line 1: text must be text, got 3"),
        ([GOOD | {"correct": "yes"}], "line 1: correct must be true, false, null or a number from 0 to 1, got 'yes'"),
        ([GOOD | {"correct": 2}], "correct must be true, false, null or a number from 0 to 1, got 2"),
        ([GOOD | {"problem": None}], "line 1: problem must be text or a whole number, got None"),
        ([GOOD | {"problem": 1.5}], "line 1: problem must be text or a whole number, got 1.5"),
        ([GOOD | {"sample": -1}], "line 1: sample must be a whole number from 0, got -1"),
        ([GOOD | {"tokens": "x"}], "line 1: tokens must be a whole number from 0, got 'x'"),
        ([GOOD | {"truncated": 1}], "line 1: truncated must be true or false, got 1"),
        ([GOOD | {"sample": 0}, GOOD | {"sample": 0}], "line 2: sample 0 of problem 'p' must stand once, is in"),
        ([], "must hold at least one"),
    ],
    ids=str,
)
def test_bad_rows_are_one_sentence(rows, says, tmp_path, capsys):
    assert cli.main(["eval", "--answers", str(write(tmp_path / "a.jsonl", rows))]) == 2
    err = capsys.readouterr().err
    assert says in err and "a.jsonl" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "expected a run, a checkpoint or a hub id, or else --answers FILE, got neither"),
        (["m", "--answers", "a.jsonl"], "got m and a.jsonl"),
        (["--answers", "a.jsonl", "--temperature", "1"], "popo eval --answers: --temperature is not read"),
        (["--answers", "a.jsonl", "--k", "0"], "--k must list whole numbers of at least 1, got [0]"),
        (["--answers", "no.jsonl"], "no.jsonl cannot be read: No such file"),
        (["m", "--nope", "3"], "error: command line: Unrecognized options: --nope, 3"),
        (["m", "--k", "many"], "error: command line: Error parsing --k"),
        (["--answers", "no.csv"], "no.csv must end in .jsonl or .parquet"),
    ],
    ids=str,
)
def test_bad_commands_are_one_sentence(args, says, capsys):
    assert cli.main(["eval", *args]) == 2
    assert says in capsys.readouterr().err


def test_the_same_file_gives_the_same_intervals(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"problem": i, "correct": i % 3 == 0} for i in range(20)])
    assert answers.summary(answers.read(path), None, "a") == answers.summary(answers.read(path), None, "a")
    with pytest.raises(UserError, match="--k must be at most 1"):
        answers.summary(answers.read(path), [2], "a")


def test_answers_claim_no_device(tmp_path):
    write(tmp_path / "a.jsonl", [GOOD])
    run = f"cli.main(['eval', '--answers', r'{tmp_path / 'a.jsonl'}'])"
    code = f"import sys\nfrom popo_jax import cli\n{run}\nprint('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip().endswith("False")
