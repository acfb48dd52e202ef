"""Figures of learning and of the correction, recomputed from the raw files with plain loops; statistics against references."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from popo_jax.report import correction, curves, learning
from popo_jax.report.read import read
from tests.report import raw, runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.write(tmp_path_factory.mktemp("made") / "run", steps=40, age=2)


def test_wilson_is_the_textbooks():
    low, high = curves.wilson(np.array(0.5), 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    low, high = curves.wilson(np.array(0.0), 20)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(0.1611, abs=1e-4)


def test_an_interval_of_problem_means_is_wilsons_for_single_answers_and_narrower_for_many():
    single = np.array([1.0] * 30 + [0.0] * 70)
    assert curves.mean_interval(single)[1:] == pytest.approx(tuple(map(float, curves.wilson(np.array(0.3), 100))))
    many = np.random.default_rng(0).binomial(8, 0.3, 100) / 8
    low, high = curves.mean_interval(many)[1:]
    assert high - low < 0.5 * 0.18
    trials = [curves.mean_interval(np.random.default_rng(i).binomial(4, 0.3, 60) / 4)[1:] for i in range(400)]
    assert 0.92 < np.mean([low <= 0.3 <= high for low, high in trials]) < 0.98, "it covers"
    assert all(map(math.isnan, curves.mean_interval(np.array([]))))
    assert curves.mean_interval(np.ones(10))[2] == pytest.approx(1)


def test_rolling_and_bands_by_hand():
    np.testing.assert_allclose(curves.rolling(np.array([1, np.nan, 3, 5.0]), 2), [1, 1, 3, 4])
    assert np.isnan(curves.rolling(np.array([np.nan, 1.0]), 5)[0])
    mean, low, high = curves.band(np.array([[1.0, 2, np.nan], [3, np.nan, np.nan]]))
    np.testing.assert_allclose(mean, [2, 2, np.nan])
    np.testing.assert_allclose(low, [1, np.nan, np.nan])
    np.testing.assert_allclose(high, [3, np.nan, np.nan])
    x = np.random.default_rng(0).normal(size=(8, 1))
    mean, low, high = curves.band(x)
    assert high[0] - mean[0] == pytest.approx(1.96 * x.std(ddof=1) / math.sqrt(8), rel=1e-3)


def test_accuracy_and_what_it_stands_over(run):
    section = learning.section(read(run))
    found = raw.line(section, "learning/accuracy", "held out")
    steps, scores = raw.having(run, "eval/accuracy")
    assert list(found.x) == steps and found.y == pytest.approx(scores)
    answers = raw.files(run, "evaluations")
    for i, s in enumerate(steps):
        right = sum(a["correct"] for a in answers[s])
        low, high = curves.wilson(np.array(right / 60), 60)
        assert (found.low[i], found.high[i]) == (pytest.approx(float(low)), pytest.approx(float(high)))
    by_step = {r["step"]: r for r in raw.rows(run)}
    assert found.other_x["responses"] == [by_step[s].get("rollouts_total", 0) for s in steps]
    assert found.other_x["tokens"] == [by_step[s].get("tokens_generated_total", 0) for s in steps]
    clock, at = 0.0, {}
    for r in raw.rows(run):
        clock += r["time/step"] if "time/step" in r else r["time/eval"]
        at[r["step"]] = clock / 3600
    assert found.other_x["hours"] == pytest.approx([at[s] for s in steps])


def test_without_evaluations_the_interval_is_of_the_configs_problems(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "evaluations")
    section = learning.section(read(tmp_path / "run"))
    found = raw.line(section, "learning/accuracy", "held out")
    low, _ = curves.wilson(np.array(found.y[0]), 60)
    assert (
        found.low[0] == pytest.approx(float(low)) and "Wilson's, of 60 problems" in raw.figure(section, "learning/accuracy").note
    )
    low, high = curves.wilson(np.array(np.mean(raw.having(run, "eval/accuracy")[1][-2:])), 60)
    expected = f"95 % interval {low:.3f} to {high:.3f} (Wilson's, of 60 problems as the config says)"
    assert section.tables[0].rows[1][2] == expected


@pytest.mark.parametrize(
    ("name", "label", "key"),
    [
        ("learning/reward", "reward", "reward/mean"),
        ("learning/reward", "accuracy in training", "accuracy/train"),
        ("learning/entropy", "entropy", "entropy"),
        ("learning/length", "mean length", "response/length"),
        ("learning/truncated", "cut", "response/truncated"),
        ("correction/age", "mean", "replay/age_mean"),
        ("correction/age", "oldest", "replay/age_max"),
        ("correction/weight-mean", "mean", "weight/mean"),
        ("correction/weight-max", "largest", "weight/max"),
        ("correction/weight-capped", "capped", "weight/capped"),
        ("correction/ess", "ESS", "weight/ess"),
        ("correction/clip-fresh", "low", "clip/low_fresh"),
        ("correction/clip-fresh", "high", "clip/high_fresh"),
        ("correction/clip-replayed", "low", "clip/low_replayed"),
        ("correction/clip-replayed", "high", "clip/high_replayed"),
        ("correction/kl-proximal", "from the step's start", "kl/proximal"),
        ("correction/kl-behaviour", "from the behaviour policy", "kl/behaviour_replayed"),
        ("correction/mismatch", "mean", "mismatch/mean"),
        ("correction/mismatch", "largest", "mismatch/max"),
        ("correction/grad-norm", "gradient", "grad_norm"),
        ("correction/update-norm", "update", "update_norm"),
        ("correction/skipped", "skipped", "update/skipped"),
        ("correction/nonfinite", "not applied", "update/nonfinite"),
    ],
)
def test_a_metrics_curve_is_the_metrics(run, name, label, key):
    section = (learning if name.startswith("learning") else correction).section(read(run))
    found, (steps, values) = raw.line(section, name, label), raw.having(run, key)
    assert list(found.x) == steps and list(found.y) == pytest.approx(values)


def test_rolling_means(run):
    section = learning.section(read(run))
    _, values = raw.having(run, "reward/mean")
    found = raw.line(section, "learning/reward", "reward, rolling mean")
    assert list(found.y) == pytest.approx([float(np.mean(values[max(0, i - 4) : i + 1])) for i in range(len(values))])


@pytest.mark.parametrize("algorithm", ["popo", "grpo"])
def test_groups_are_those_sampled_and_slots_those_trained_on(tmp_path, algorithm):
    run = runs.write(tmp_path / "run", algorithm=algorithm, steps=20)
    section = learning.section(read(run))
    for name in ("effective", "all right", "all wrong", "invalid"):
        _, values = raw.having(run, f"groups/{name.replace(' ', '_')}")
        assert list(raw.line(section, "learning/groups", name).y) == values
    if algorithm == "grpo":
        assert not [f for f in section.figures if f.id == "learning/slots"]
        return
    series = {s.name: s for s in raw.figure(section, "learning/slots").series}
    replays = {s: len(r) for s, r in raw.files(run, "replays").items()}
    for i, r in enumerate(raw.rows(run)[1:]):
        got = {k: s.y[i] for k, s in series.items()}
        assert got["replayed"] == pytest.approx(replays[i + 1] / 8) and got["unfilled"] == pytest.approx(r["replay/unfilled"] / 8)
        assert got["own groups"] == pytest.approx(r["groups/effective"]) and sum(got.values()) == pytest.approx(1)


def test_slots_of_stored_groups_alone_are_counted(tmp_path):
    run = runs.write(tmp_path / "run", steps=5, more={"replay/filled": 8, "replay/unfilled": 2})
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["replay"]["extra"] = 8
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    figure = raw.figure(learning.section(read(run)), "learning/slots")
    assert [s.y[0] for s in figure.series] == [6 / 16, 8 / 16, 2 / 16] and "8 slots are for stored groups alone" in figure.note


def test_dynamic_sampling_is_estimated_from_the_share_of_groups(run):
    section = learning.section(read(run))
    ours = raw.line(section, "learning/sampling-cost", "this run")
    theirs = raw.line(section, "learning/sampling-cost", "dynamic sampling, estimated")
    total = 0.0
    for i, r in enumerate(raw.rows(run)[1:]):
        share = r["groups/effective"]
        total += 32 * (min(math.ceil(1 / share), 4) if share else 4)
        assert (ours.y[i], theirs.y[i]) == (r["rollouts_total"], pytest.approx(total))
    assert "estimated" in raw.figure(section, "learning/sampling-cost").title


def test_in_short(run):
    (table,) = learning.section(read(run)).tables
    found = {name: (value, where) for name, value, where in table.rows}
    steps, scores = raw.having(run, "eval/accuracy")
    assert found["mean of the last two evaluations"][0] == pytest.approx(np.mean(scores[-2:]))
    assert found["best evaluation"] == (pytest.approx(max(scores)), f"step {steps[int(np.argmax(scores))]}")
    assert found["responses"][0] == 40 * 32 and found["steps"][0] == 40
    assert "95 % interval" in found["mean of the last two evaluations"][1]


def test_ages_and_uses_are_those_of_the_replays(run):
    section = correction.section(read(run))
    replays = [r for rows in raw.files(run, "replays").values() for r in rows]
    ages = Counter(r["age"] for r in replays)
    (found,) = raw.figure(section, "correction/age-histogram").series
    assert dict(zip(found.x, found.y, strict=True)) == ages == {2: len(replays)}
    times = Counter(Counter(r["group_id"] for r in replays).values())
    (found,) = raw.figure(section, "correction/uses").series
    assert dict(zip(found.x, found.y, strict=True)) == times


def test_lines_of_health_come_with_advice(run):
    section = correction.section(read(run))
    lines = {f.id: f.worry.at for f in section.figures if f.worry}
    assert lines["correction/kl-proximal"] == 0.3 and lines["correction/kl-behaviour"] == 0.5
    assert lines["correction/skipped"] == 0.9 and lines["correction/nonfinite"] == 0 and "correction/age-histogram" not in lines
    assert all(f.worry or f.note for f in section.figures if "age-histogram" not in f.id), "a line, or why there is none"
    assert raw.figure(section, "correction/age").worry.at == 8 and "max_age" in raw.figure(section, "correction/age").worry.advice
    _, norms = raw.having(run, "grad_norm")
    assert raw.figure(section, "correction/grad-norm").worry.at == pytest.approx(10 * np.mean(norms[:5]))
    _, entropies = raw.having(run, "entropy")
    assert raw.figure(learning.section(read(run)), "learning/entropy").worry.at == pytest.approx(0.1 * np.mean(entropies[:10]))


def test_a_run_without_replay_or_anything_has_sentences(tmp_path):
    section = correction.section(read(runs.write(tmp_path / "run", algorithm="grpo", steps=5)))
    assert "No group was replayed" in section.notes[0] and not [f for f in section.figures if "weight" in f.id or "age" in f.id]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text(yaml.safe_dump({"eval": {"problems": 3}}))
    section = learning.section(read(tmp_path / "empty"))
    assert not section.figures and not section.tables and "No evaluation" in section.notes[0]
    assert not correction.section(read(tmp_path / "empty")).figures


def test_tasks_share_the_problems_of_the_config(run, tmp_path):
    """60 problems of two tasks: 30 each."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "evaluations")
    row = {"step": 0, "eval/accuracy": 0.4, "eval/logic/accuracy": 0.2, "eval/math/accuracy": 0.6, "eval/blind/accuracy": 0.1}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    section = learning.section(read(tmp_path / "run"))
    expected = {"held out": (0.4, 60), "logic": (0.2, 30), "math": (0.6, 30), "held out, pictures in grey": (0.1, 60)}
    for name, (share, n) in expected.items():
        found, ends = raw.line(section, "learning/accuracy", name), curves.wilson(np.array(share), n)
        assert (found.y[0], found.low[0], found.high[0]) == (share, *map(pytest.approx, map(float, ends)))
    assert len(raw.figure(section, "learning/accuracy").series) == 4


def test_the_summarys_interval_is_over_problems_in_whatever_order_they_stand(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "evaluations" / "000040.parquet"
    table = pq.read_table(file)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), file)
    solved = Counter()
    for step in (30, 40):
        solved.update({r["prompt_id"]: r["correct"] / 2 for r in raw.files(run, "evaluations")[step]})
    _, low, high = curves.mean_interval(np.array(list(solved.values())))
    for path in (run, tmp_path / "run"):
        (table,) = learning.section(read(path)).tables
        assert table.rows[1][2] == f"95 % interval {low:.3f} to {high:.3f}"


def test_in_short_without_an_evaluation(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    rows = [{k: v for k, v in r.items() if not k.startswith("eval/")} for r in raw.rows(run)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    section = learning.section(read(tmp_path / "run"))
    assert [r[:2] for r in section.tables[0].rows[:2]] == [("steps", 40), ("responses", 40 * 32)] and len(
        section.tables[0].rows
    ) == 4
    assert "No evaluation is recorded" in section.notes[0]


def test_sampling_cost_stands_over_what_the_run_generated(run):
    figure = raw.figure(learning.section(read(run)), "learning/sampling-cost")
    tokens = [r["tokens_generated_total"] for r in raw.rows(run)[1:]]
    assert [list(s.other_x["tokens"]) for s in figure.series] == [tokens, tokens]


def test_nothing_finite(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    rows = [{k: v if k == "step" else float("nan") for k, v in r.items()} for r in raw.rows(run)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    section = learning.section(read(tmp_path / "run"))
    assert section.figures == () and "No evaluation is recorded" in section.notes[0]
    one = learning.section(read(runs.write(tmp_path / "one", steps=1)))
    assert raw.line(one, "learning/groups", "effective").x == [1] and one.tables[0].rows[0][2] == "step 0"
