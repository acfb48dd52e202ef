"""`popo eval` end to end on tiny policies: a run, an exported folder; suites from files; cut short and gone on with."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
import yaml

import popo_jax.policy as policies
from popo_jax import cli, exam, launch
from popo_jax.policy import Policy
from tests import tiny
from tests.killable import lucky

SHORT = ["--max-response-tokens", "6", "--max-prompt-tokens", "120"]


def run_eval(*args: object) -> None:
    assert cli.main(["eval", *(str(a) for a in args)]) == 0


def refused(capsys: Any, *args: object) -> str:
    capsys.readouterr()
    assert cli.main(["eval", *(str(a) for a in args)]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and len(err.splitlines()) == 1, err
    return err


def rows(folder: Path, name: str = "answers.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "tiny"
    built = tiny.built(tiny.config())
    policies.save(folder, Policy(built.model.c, tiny.TOKENIZER), tiny.sharp(built.fresh_params(jax.random.key(0)), 8.0))
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """Five problems, one of them twice."""
    lines = [json.dumps({"question": f"{i} + 1?", "answer": str(i + 1)}) for i in (0, 1, 2, 3, 4, 0)]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "problems.jsonl"


@pytest.fixture(autouse=True)
def _luck(monkeypatch):
    monkeypatch.setattr(exam, "Graders", lucky)


def test_a_folder_answers_a_suite_of_a_file(checkpoint, data, tmp_path, capsys):
    out = tmp_path / "out"
    run_eval(checkpoint, "--task", "aime24", "--data", data, "--k", 3, 4, *SHORT, "--out", out)
    said = capsys.readouterr().out
    assert "AIME24" in said and "pass@4" in said and "5 problems, 20 answers" in said
    kept = rows(out)
    assert [(r["problem"], r["sample"]) for r in kept] == [(kept[4 * p]["problem"], j) for p in range(5) for j in range(4)]
    assert kept[0]["prompt"] == "0 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert kept[0]["answer"] == "1" and {r["version"] for r in kept} == {0} and max(r["tokens"] for r in kept) == 6
    assert all(r["truncated"] == (r["tokens"] == 6) or r["tokens"] == 6 for r in kept) and any(r["truncated"] for r in kept)
    found = json.loads((out / "summary.json").read_text())
    result = found["results"]["AIME24"]
    assert list(result["metrics"]) == ["avg@4", "pass@1", "pass@2", "pass@3", "pass@4"]
    by_hand = sum(r["correct"] for r in kept) / 20
    assert 0 < by_hand < 1 and result["metrics"]["avg@4"]["value"] == pytest.approx(by_hand)
    assert result["truncated"] == sum(r["truncated"] for r in kept) / 20 and found["greedy"] is None
    run_eval("--answers", out / "answers.jsonl", "--k", 3, 4, "--out", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["results"] == found["results"]


def test_rows_at_once_change_no_answer(checkpoint, data, tmp_path):
    for n in (4, 8, 256):
        run_eval(checkpoint, "--data", data, "--k", 4, *SHORT, "--rows", n, "--out", tmp_path / str(n))
    assert rows(tmp_path / "4") == rows(tmp_path / "8") == rows(tmp_path / "256")
    assert {r["task"] for r in rows(tmp_path / "4")} == {"math"}


@pytest.mark.parametrize("left", [0, 1, 9, 17])
def test_a_cut_evaluation_goes_on(checkpoint, data, tmp_path, monkeypatch, left):
    """Two suites, 8 rows at a time; `left` whole lines and a torn one are there; the rest is sampled, the same as at once."""
    args = [checkpoint, "--task", "countdown", "arithmetic", "--problems", 3, "--k", 4, *SHORT, "--rows", 8, "--out"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_eval(*args, whole)
    shutil.copytree(whole, cut)
    lines = (whole / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (cut / "answers.jsonl").write_bytes(b"".join(lines[:left]) + lines[left][:20])
    (cut / "summary.json").unlink()
    asked = []
    real = exam.evaluate.answer
    monkeypatch.setattr(exam.evaluate, "answer", lambda params, p, *a, **kw: asked.extend(p) or real(params, p, *a, **kw))
    run_eval(*args, cut)
    assert rows(cut) == rows(whole) and len(asked) == 6 - left // 4
    assert (cut / "summary.json").read_text() == (whole / "summary.json").read_text()


def test_an_interrupted_evaluation_keeps_what_it_has(checkpoint, tmp_path, monkeypatch):
    real, calls = exam.evaluate.answer, []

    def answer(*a: Any, **kw: Any) -> Any:
        calls.append(kw["first"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*a, **kw)

    monkeypatch.setattr(exam.evaluate, "answer", answer)
    args = [checkpoint, "--task", "countdown", "--problems", 5, "--k", 2, *SHORT, "--rows", 4, "--out", tmp_path / "out"]
    assert cli.main(["eval", *(str(a) for a in args)]) == 130
    assert len(rows(tmp_path / "out")) == 8 and not (tmp_path / "out" / "summary.json").exists()
    run_eval(*args)
    assert len(rows(tmp_path / "out")) == 10 and calls == [0, 2, 4, 4]


def test_another_evaluation_in_the_folder_is_refused_and_kept(checkpoint, data, tmp_path, capsys):
    args = [checkpoint, "--data", data, *SHORT, "--out", tmp_path / "out"]
    run_eval(*args, "--k", 2)
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    assert "got one whose samples is 2, not 4" in refused(capsys, *args, "--k", 4)
    assert "got one whose seed is 0, not 1" in refused(capsys, *args, "--k", 2, "--seed", 1)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before
    (tmp_path / "out" / "settings.json").unlink()
    assert "hold an evaluation to go on with, got something else" in refused(capsys, *args, "--k", 2)


def test_a_run_and_its_export_answer_alike(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "Graders", lucky)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny.BASE | {"steps": 2}))
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli.main(["train", str(tmp_path / "c.yaml"), "--run-dir", str(run)]) == 0
    assert cli.main(["export", str(run), "--out", str(out)]) == 0
    shared = ["--problems", 4, "--k", 2, "--greedy", "True"]
    monkeypatch.chdir(tmp_path)
    run_eval(run, *shared)
    (of_run,) = (run / "eval").iterdir()
    assert of_run.name.startswith("000002-countdown-k2-")
    assert {r["version"] for r in rows(of_run)} == {2} and len(rows(of_run)) == 8 and len(rows(of_run, "greedy.jsonl")) == 4
    same = ["--task", "countdown", "--data", _problems_of(of_run, tmp_path / "same.jsonl"), *shared]
    run_eval(out, *same, "--max-prompt-tokens", 24, "--max-response-tokens", 6)
    (of_folder,) = tmp_path.glob("eval-out-countdown-k2-*")
    for name in ("answers.jsonl", "greedy.jsonl"):
        assert [r["text"] for r in rows(of_folder, name)] == [r["text"] for r in rows(of_run, name)]
    assert "--dtype goes with a checkpoint" in refused(capsys, run, "--dtype", "bfloat16")
    assert "--step 3 goes with a run" in refused(capsys, out, "--step", 3)


def _problems_of(folder: Path, path: Path) -> Path:
    """The Countdown problems of an evaluation as a file of problems."""
    asked = {r["problem"]: {"nums": r["answer"]["nums"], "target": r["answer"]["target"]} for r in rows(folder)}
    path.write_text("".join(json.dumps(p) + "\n" for p in asked.values()))
    return path


def test_a_hub_data_set_is_loaded_by_its_name(checkpoint, tmp_path, monkeypatch):
    asked = []

    def load_dataset(*args: Any, split: str) -> list[dict[str, str]]:
        asked.append((*args, split))
        return [{"question": "1 + 1?", "answer": "2"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    run_eval(checkpoint, "--task", "AMC23", "minerva", "--k", 1, *SHORT, "--out", tmp_path / "out")
    assert asked == [("math-ai/amc23", None, "test"), ("math-ai/minervamath", None, "test")]
    assert list(json.loads((tmp_path / "out" / "summary.json").read_text())["results"]) == ["AMC23", "Minerva", "all tasks"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "--task must name a task or a suite"),
        (["--task", "aime23"], "--task must be one of AIME24, AIME25, AMC23, MATH500, Minerva, OlympiadBench, countdown,"),
        (["--task", "math5000"], "(did you mean math500?)"),
        (["--task", "aime24", "math500", "--data", "x.jsonl"], "--data goes with one --task, got aime24, math500"),
        (["--task", "aime24", "--data", "no.jsonl"], "no.jsonl cannot be read"),
        (["--task", "countdown", "--answer-column", "x"], "--problem-column and --answer-column go with a suite, or math"),
        (["--task", "countdown", "--max-prompt-tokens", "5"], "must have a prompt of 1 to 5 tokens"),
        (["--task", "countdown", "--max-response-tokens", "99999"], "must be at most the 32768 positions"),
        (["--task", "countdown", "--top-p", "0"], "--top-p must lie in (0, 1], got 0.0"),
        (["--task", "countdown", "--rows", "0"], "--rows must be at least 1, got 0"),
        (["--task", "countdown", "--seed", "-1"], "--seed must lie between 0 and 2^32 - 1, got -1"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(checkpoint, capsys, tmp_path, args, says):
    assert says in refused(capsys, checkpoint, *args, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_model_is_one_sentence(tmp_path, capsys):
    assert "must be a run directory (with config.yaml), a checkpoint" in refused(capsys, tmp_path, "--task", "aime24")
    assert "got none" in refused(capsys, tmp_path / "no", "--task", "aime24")
