"""The study: cells that parse, a runner that resumes, statistics by hand, tables and figures that agree with the raw rows."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.study import __main__ as study
from benchmarks.study import figures, results, runner, tables
from benchmarks.study.plan import EVERY, MAIN, SEEDS, SIZES, Cell, cells
from popo_jax.cli import parse_config

HERE = Path(study.__file__).parent


@pytest.mark.parametrize("name", EVERY)
def test_every_algorithm_is_made_of_settings_that_are_read(name):
    path, *settings = Cell(MAIN, name, 3).settings
    said: list[str] = []
    c = parse_config(path, settings, said.append)
    assert c.seed == 3 and c.algorithm.name == dict(itertools.pairwise(settings))["--algorithm"]
    assert not said, "the task's file names a setting that this algorithm does not read"


@pytest.mark.parametrize("path", sorted((HERE / "tasks").glob("*.yaml")), ids=lambda p: p.stem)
def test_tasks_differ_in_task_limits_and_warm_start_only(path):
    mine, main = parse_config(str(path), [], print), parse_config(str(HERE / "tasks" / f"{MAIN}.yaml"), [], print)
    for name in ("steps", "algorithm", "model", "batch", "loss", "weight", "replay", "optim", "eval", "selection"):
        assert getattr(mine, name) == getattr(main, name), name


def test_the_plan_holds_every_cell_once():
    every = cells()
    names = [c.name for c in every]
    assert len(set(names)) == len(names) and all(set(n) <= set("abcdefghijklmnopqrstuvwxyz0123456789-/") for n in names)
    seeds = {(a, c.group_size): 0 for c in every if c.task == MAIN for a in [c.algorithm]}
    for c in every:
        if c.task == MAIN:
            seeds[c.algorithm, c.group_size] += 1
    assert [seeds[a, 8] for a in SEEDS] == [5] * 5
    assert all(seeds[a, 8] == 3 for a in EVERY if a not in SEEDS)
    assert all(seeds[a, G] == 2 for a in ("grpo", "popo") for G in SIZES)


def row(step: int, score: float | None = None, rollouts: int = 0, **more: float) -> dict:
    return {"step": step, "rollouts_total": rollouts or None, "eval/accuracy": score} | more


def run_of(scores: list[float], *, seed: int = 0, per_step: int = 10, every: int = 2, **ending) -> results.Run:
    """Evaluated every `every` steps, `per_step` responses a step."""
    rows = [row(0, scores[0])]
    for n in range(1, every * (len(scores) - 1) + 1):
        rows.append(row(n, scores[n // every] if n % every == 0 else None, n * per_step, **{"groups/effective": 0.25}))
    return results.Run({"seed": seed, "stopped": None} | ending, rows)


def test_smoothing_takes_the_last_three_evaluations_of_what_there_is():
    runs = [run_of([0.1, 0.3, 0.2, 0.7])]
    assert results.grid(runs).tolist() == [0, 2, 4, 6]
    np.testing.assert_allclose(results.accuracy(runs, smooth=True), [[0.1, 0.2, 0.2, 0.4]])
    np.testing.assert_allclose(results.final(runs), [0.4])


def test_a_stopped_run_keeps_its_last_accuracy():
    runs = [run_of([0.1, 0.2, 0.3, 0.4]), run_of([0.1, 0.5], seed=1)]
    np.testing.assert_allclose(results.accuracy(runs, smooth=False)[1], [0.1, 0.5, 0.5, 0.5])
    np.testing.assert_allclose(results.responses(runs)[1], [0, 20, 20, 20])


def test_reach_by_hand():
    """Means over seeds 0.1, 0.3, 0.5, 0.7; smoothed 0.1, 0.2, 0.3, 0.5."""
    runs = [run_of([0.1, 0.2, 0.4, 0.6]), run_of([0.1, 0.4, 0.6, 0.8], seed=1)]
    got = results.reach(runs, 0.3 - 1e-9, by="responses")
    assert (got.at, got.end) == (40, 60) and got.low == 40 and got.high == 60
    assert results.reach(runs, 0.05, by="steps").at == 0
    never = results.reach(runs, 0.9, by="steps")
    assert np.isinf(never.at) and tables.of_reach(never, tables.whole) == "> 6" and tables.share(never, 12) == "> 50 %"


def test_interval_covers_the_mean_and_is_none_for_one_seed():
    low, high = results.interval(np.array([0.1, 0.2, 0.3, 0.4, 0.5]))
    assert 0.1 <= low < 0.25 and 0.35 < high <= 0.5
    assert results.interval(np.array([0.2, 0.2])) == (0.2, 0.2) and np.isnan(results.interval(np.array([0.2]))).all()


def test_differences_are_paired_by_seed():
    a = [run_of([0.1, s], seed=i) for i, s in enumerate((0.3, 0.5, 0.7))]
    b = [run_of([0.1, s], seed=i) for i, s in ((2, 0.5), (0, 0.1))]
    np.testing.assert_allclose(tables.differences(a, b), [0.1, 0.1])


INTERRUPTED = 100
"""Exit 0 after SIGTERM: saved, not finished."""


class FakeTrain:
    """Stands for `popo train`: writes a run directory and ends with the codes given."""

    def __init__(self, *codes: int):
        self.codes, self.calls = list(codes), []

    def __call__(self, command, stdout=None, **_):
        if command[0] == "git":
            return subprocess.CompletedProcess(command, 0, "abc1234\n")
        self.calls.append(command)
        folder = Path(command[command.index("--resume" if "--resume" in command else "--run-dir") + 1])
        (folder / "checkpoints" / "20").mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text(json.dumps(row(0, 0.5)) + "\n")
        code = self.codes.pop(0)
        (folder / "summary.json").write_text(json.dumps({"finished": code == 0}))
        if code == INTERRUPTED:
            code = 0
        stdout.write("error: step 3: a dead verifier\n" if code else "done\n")
        return subprocess.CompletedProcess(command, code)


def test_the_runner_keeps_what_ended_resumes_what_broke_and_repeats_nothing(tmp_path, monkeypatch):
    fake = FakeTrain(0, -9, 2, INTERRUPTED)
    monkeypatch.setattr(runner.subprocess, "run", fake)
    every = [Cell(MAIN, a, 0) for a in ("grpo", "popo", "dapo", "mopps")]
    failed = runner.run_all(every, tmp_path / "work", tmp_path / "results", workers=1)
    assert [c.algorithm for c in failed] == ["popo", "mopps"] and len(fake.calls) == 4
    kept = results.load(tmp_path / "results")
    assert {k[1]: runs[0].ending["stopped"] for k, runs in kept.items()} == {
        "grpo": None,
        "dapo": "error: step 3: a dead verifier",
    }
    assert kept[MAIN, "grpo", 8][0].rows == [row(0, 0.5)]
    fake.codes = [0, 0]
    assert runner.run_all(every, tmp_path / "work", tmp_path / "results", workers=1) == []
    assert len(fake.calls) == 6 and all("--resume" in c for c in fake.calls[-2:]) and "popo" in fake.calls[-2][-1]


def test_a_figure_knows_the_series_it_was_drawn_from(tmp_path):
    pytest.importorskip("matplotlib")
    figure = {"accuracy, % against steps": {"grpo": {"x": [0.0, 1.0], "y": [1.0, 2.0], "low": [1.0, 1.5], "high": [1.0, 2.5]}}}
    figures.draw(figure, tmp_path / "a.png")
    assert figures.digest_in(tmp_path / "a.png") == figures.digest(figure)


committed = pytest.mark.skipif(not any(runner.RESULTS.glob("*/*.json")), reason="no raw results yet")


@committed
def test_the_committed_tables_agree_with_the_raw_results():
    assert (HERE / "RESULTS.md").read_text() == tables.document(runner.RESULTS)
    assert study.block(runner.RESULTS) in study.README.read_text()


@committed
def test_the_committed_figures_agree_with_the_raw_results():
    made = figures.figures(runner.RESULTS)
    shown = json.loads((HERE / "figures" / "figures.json").read_text())
    assert shown == json.loads(json.dumps(made))
    assert {p.stem for p in (HERE / "figures").glob("*.png")} == made.keys()
    for name, figure in made.items():
        assert figures.digest_in(HERE / "figures" / f"{name}.png") == figures.digest(figure), name
    series = shown[MAIN]["accuracy, % against steps"]["grpo"]
    runs = results.load(runner.RESULTS)[MAIN, "grpo", 8]
    assert series["y"][-1] == pytest.approx(100 * results.final(runs).mean(), rel=1e-4)
