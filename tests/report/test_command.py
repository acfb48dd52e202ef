"""`popo report` from the command line, on runs in any state; the same figures for programs; cards of what is exported."""

from __future__ import annotations

import json
import shutil

import pytest

from popo_jax import cli
from tests.report import runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return [runs.write(folder / f"{a}-{s}", algorithm=a, seed=s, steps=20) for a, s in (("popo", 0), ("popo", 1), ("grpo", 0))]


def report(*args):
    return cli.main(["report", *map(str, args)])


def test_a_page_is_written_beside_the_run(made, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(made[0], run)
    assert report(run) == 0
    page = (run / "report.html").read_text()
    assert f"Report: {run / 'report.html'}" in (said := capsys.readouterr().out) and "nothing to worry about" in said
    for title in ("Is it learning?", "Is the off-policy correction healthy?", "What was it trained on?", "Safeguards and limits"):
        assert title in page
    assert "Samples" in page and "Provenance and cost" in page and "Nothing to worry about was found" in page


def test_programs_get_the_same_figures(made, capsys):
    assert report(made[0], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {s["id"] for s in found["sections"]} == {"learning", "correction", "data", "safeguards", "samples", "provenance"}
    accuracy = next(f for s in found["sections"] for f in s["figures"] if f["id"] == "learning/accuracy")
    assert accuracy["series"][0]["x"] == [0, 10, 20] and found["findings"] == [] and found["runs"] == [str(made[0])]
    ids = [x["id"] for s in found["sections"] for x in (*s["figures"], *s["tables"])]
    assert len(ids) == len(set(ids))


def test_several_runs_are_compared(made, tmp_path, capsys):
    assert report(*made, "--out", tmp_path / "deep" / "r.html") == 0
    page = (tmp_path / "deep" / "r.html").read_text()
    assert "The runs side by side" in page and "3 runs" in page
    assert report(*made, "--json", "--out", tmp_path / "r.json") == 0
    (section,) = json.loads((tmp_path / "r.json").read_text())["sections"]
    assert [row[0] for row in section["tables"][0]["rows"]] == ["popo", "grpo"]


def test_a_card_is_markdown(made, capsys):
    assert report(made[0], "--card") == 0
    text = capsys.readouterr().out
    assert text.startswith("---\nlibrary_name: transformers") and "after step 20" in text and "held-out accuracy" in text


@pytest.mark.parametrize("state", ["no metrics", "only a config", "nothing but metrics", "torn", "one step", "no samples"])
def test_a_run_in_any_state_has_a_page_that_says_what_is_missing(made, tmp_path, state):
    run = tmp_path / "run"
    shutil.copytree(made[0], run)
    if state == "no metrics":
        (run / "metrics.jsonl").unlink()
    elif state == "only a config":
        for path in run.iterdir():
            if path.name != "config.yaml":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif state == "nothing but metrics":
        for path in run.iterdir():
            if path.name != "metrics.jsonl":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif state == "torn":
        text = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(text[: len(text) // 2])
        (run / "samples" / "000004.parquet").write_bytes(b"")
    elif state == "one step":
        (run / "metrics.jsonl").write_text("".join((run / "metrics.jsonl").read_text().splitlines(keepends=True)[:2]))
        for folder in ("samples", "replays", "evaluations"):
            for f in (run / folder).iterdir():
                if int(f.stem) > 1:
                    f.unlink()
    else:
        shutil.rmtree(run / "samples")
    assert report(run, "--out", tmp_path / "r.html") == 0
    assert report(run, "--json", "--out", tmp_path / "r.json") == 0
    assert report(run, "--card", "--out", tmp_path / "README.md") == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert bool(found["missing"]) == (state != "one step"), found["missing"]
    assert len((tmp_path / "r.html").read_text()) > 10**6


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "expected at least one run directory, got none"),
        (["none"], "none must be a run directory (with config.yaml or metrics.jsonl), got none"),
        (["x", "--card", "--json"], "--card is of one run and without --json, got 1 runs and --json"),
        (["x", "y", "--card"], "--card is of one run"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(args, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report(*args) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.strip().splitlines()) == 1


ODD = {
    "a step of 10^9": {"metrics.jsonl": '{"step": 1}\n{"step": 1000000000}\n'},
    "a step of 10^20": {"metrics.jsonl": '{"step": 1}\n{"step": 100000000000000000000}\n'},
    "a number beyond any float": {"metrics.jsonl": '{"step": 1, "entropy": 1' + "0" * 400 + "}\n"},
    "sessions of other kinds": {"sessions.jsonl": '{"devices": "x", "packages": [1], "command": 5, "step": "a"}\n[1]\n'},
    "tasks of other kinds": {"config.yaml": "tasks: [a, {name: 5}, {name: null}]\nfingerprints: [1]\nalgorithm: {name: 5}\n"},
    "tasks that are text": {"config.yaml": "tasks: math\nfingerprints: x\nreplay: {capacity: big}\neval: {problems: 0}\n"},
    "settings that are a list": {"config.yaml": "[1, 2]\n"},
    "settings that are numbers": {"config.yaml": "batch: 5\nreplay: 3\ntasks: 7\nsample: null\n"},
}


@pytest.mark.parametrize("state", ODD)
def test_files_of_other_kinds_have_a_page_too(made, tmp_path, state):
    run = tmp_path / "run"
    shutil.copytree(made[0], run)
    for name, text in ODD[state].items():
        (run / name).write_text(text)
    assert report(run, "--json", "--out", tmp_path / "r.json") == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert "could not be made" not in json.dumps(found)
    assert report(run, "--card", "--out", tmp_path / "README.md") == 0
    assert report(run, made[1], "--out", tmp_path / "r.html") == 0


def test_a_part_that_fails_is_a_sentence_and_the_rest_is_there(made, tmp_path, monkeypatch):
    from popo_jax.report import account

    def fails(run):
        raise ZeroDivisionError("of nothing")

    monkeypatch.setitem(account.SECTIONS, "data", ("What was it trained on?", fails))
    assert report(made[0], "--out", tmp_path / "r.html") == 0
    page = (tmp_path / "r.html").read_text()
    assert "This part could not be made of the run" in page and "ZeroDivisionError" in page and "Accuracy on held-out" in page


def test_a_page_says_what_it_looked_for_and_nothing_else(made, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(made[0], run)
    report(run, "--json")
    assert "slice-fell" in (all_ := json.loads(capsys.readouterr().out)["checked"]) and "reward-hacking" in all_
    shutil.rmtree(run / "evaluations")
    report(run, "--json")
    names = json.loads(capsys.readouterr().out)["checked"]
    assert (
        not {"slice-fell", "slice-untrained", "got-worse", "reward-without-accuracy"} & set(names) and "reward-hacking" in names
    )
    shutil.rmtree(run / "samples")
    report(run, "--card")
    text = capsys.readouterr().out
    assert "Looked for: dead verifier" in text and "reward hacking" not in text
