"""Limits, verdicts and suspicious answers, counted again from a run's files by plain loops."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter, defaultdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from popo_jax.report.read import read
from popo_jax.report.safeguards import section
from popo_jax.report.suspicions import right_rows, same_rows, short_rows
from tests.report.runs import write
from tests.report.test_training_data import get, replayed, sampled


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def mean(values):
    values = [v for v in values if v is not None]
    return sum(values) / len(values)


def put(path, step, **columns):
    file = path / "samples" / f"{step:06d}.parquet"
    table = pq.read_table(file)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, file)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Three verdicts are failures, and limits were met."""
    path = write(tmp_path_factory.mktemp("safe") / "r", steps=30)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["algorithm"]["dead_steps"], config["optim"]["grad_clip"] = 10, 1.1
    config["verifier"] = {"seconds": 5.0, "memory_gb": 2.0}
    config["replay"]["max_age"], config["replay"]["max_uses"] = 1, 2
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    rows = metrics(path)
    for r in rows[1:]:
        r |= {"update/skipped": float(r["step"] % 4 == 0), "update/nonfinite": float(r["step"] == 7)}
        r |= {"groups/effective": 0.0 if r["step"] in (3, 9, 10, 11, 20, 21) else 0.5, "response/truncated": r["step"] / 100}
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    reason = pq.read_table(path / "samples" / "000002.parquet")["reason"].to_pylist()
    reason[:5] = ["timeout", "memory", "worker exited (signal 11)", "timeout", "verifier error: ValueError: no"]
    put(path, 2, reason=reason)
    return path


def test_settings(path):
    found = {(r[0], r[3].split(",")[0].split()[0]): r[1:3] for r in get(section(read(path)).tables, "safeguards/settings").rows}
    rows, again = metrics(path)[1:], replayed(path)
    times = Counter(r["group_id"] for r in again)
    assert found["loss.clip_low", "fresh"] == (0.2, pytest.approx(mean(r["clip/low_fresh"] for r in rows)))
    assert found["loss.clip_high", "replayed"] == (0.28, pytest.approx(mean(r["clip/high_replayed"] for r in rows)))
    assert found["loss.dual_clip", "tokens"] == ("off", None)
    assert found["weight.cap", "replayed"] == (2.0, pytest.approx(mean(r["weight/capped"] for r in rows)))
    assert found["replay.min_age", "replays"] == (1, 1.0) and found["replay.max_age", "replays"] == (1, 1.0)
    assert found["replay.max_uses", "count"] == (2, sum(n >= 2 for n in times.values())) and again
    full = mean(float(r["replay/size"] == 32) for r in rows)
    assert found["replay.capacity", "steps"] == (32, pytest.approx(full)) and 0 < full < 1
    assert found["sample.max_response_tokens", "responses"] == (64, pytest.approx(mean(r["response/truncated"] for r in rows)))
    assert found["optim.grad_clip", "steps"] == (1.1, pytest.approx(mean(float(r["grad_norm"] > 1.1) for r in rows)))
    assert found["batch.mini_batches", "count"] == (1, 7.0)
    assert found["updates that are finite", "count"] == ("always", 1.0)
    assert found["verifier.seconds", "count"] == (5.0, 2.0) and found["verifier.memory_gb", "count"] == (2.0, 1.0)
    assert found["algorithm.dead_steps", "count"] == (10, 3.0)


def test_verdicts(path):
    rows, table = sampled(path), get(section(read(path)).tables, "safeguards/verdicts")
    by = defaultdict(list)
    for r in rows:
        by[r["reason"], r["task"]].append(r["score"])
    assert {r[:2]: r[2:] for r in table.rows} == {
        k: (len(v), pytest.approx(len(v) / len(rows)), pytest.approx(sum(v) / len(v))) for k, v in by.items()
    }
    assert [r[2] for r in table.rows] == sorted((len(v) for v in by.values()), reverse=True)


def test_failures(path):
    rows = get(section(read(path)).tables, "safeguards/failures").rows
    assert [r[:2] for r in rows] == [("timeout", 2), ("memory limit", 1), ("crash", 1), ("exception", 1)]
    assert [r[2] for r in rows] == pytest.approx([n / 960 for n in (2, 1, 1, 1)])


def test_a_reason_that_only_sounds_like_a_failure(tmp_path):
    path = write(tmp_path / "r", steps=1)
    put(path, 1, reason=["timeouts are fun", "memory of it", "timeout (5 s)", *(["wrong"] * 29)])
    rows = get(section(read(path)).tables, "safeguards/failures").rows
    assert [r[1] for r in rows] == [1, 0, 0, 0]


def test_verdicts_over_time(path):
    figure = get(section(read(path)).figures, "safeguards/verdicts-over-time")
    by = defaultdict(Counter)
    for r in sampled(path):
        by[r["step"]][r["reason"]] += 1
    for series in figure.series:
        assert list(series.x) == list(range(1, 31))
        assert list(series.y) == pytest.approx([by[s][series.name] / by[s].total() for s in series.x])
    assert {s.name for s in figure.series} == {reason for n in by.values() for reason in n}


def test_verdicts_over_many_steps_and_reasons(tmp_path):
    path = write(tmp_path / "r", steps=230, prompts=2, group=3, problems=9, held_out=3, every=230)
    reasons = [f"reason {k}" for k in range(11)]
    for step in range(1, 231):
        put(path, step, reason=[reasons[(step * i) % 11] for i in range(6)])
    figure = get(section(read(path)).figures, "safeguards/verdicts-over-time")
    assert len(figure.series) == 9 and figure.series[-1].name == "others" and len(figure.series[0].x) == 100
    total = Counter(r["reason"] for r in sampled(path))
    assert min(total[s.name] for s in figure.series[:8]) >= max(
        total[r] for r in total if r not in {s.name for s in figure.series}
    )
    first = list(figure.series[0].x)
    assert first[0] == 1 and {b - a for a, b in itertools.pairwise(first)} == {2, 3}
    rows = [r for r in sampled(path) if first[40] <= r["step"] < first[41]]
    for series in figure.series[:8]:
        assert series.y[40] == pytest.approx(mean(float(r["reason"] == series.name) for r in rows))
    assert [sum(s.y[b] for s in figure.series) for b in range(100)] == pytest.approx([1.0] * 100)


def test_short_answers(tmp_path):
    path = write(tmp_path / "r", steps=12, group=5)
    lengths = [[(7 * i * step) % 61 + 1 for i in range(40)] for step in range(1, 13)]
    for step, n in enumerate(lengths, 1):
        put(path, step, response_tokens=n)
    groups, expected = defaultdict(list), []
    for r in sampled(path):
        groups[r["group_id"]].append(r["response_tokens"])
    for r in sampled(path):
        median = statistics.median(groups[r["group_id"]])
        n = r["response_tokens"]
        short = r["correct"] == 1 and r["signal"] == "effective" and n < 8 and median > 16 and n < median / 4
        expected.append(short)
    run = read(path)
    assert short_rows(run, right_rows(run)).tolist() == expected and 3 < sum(expected) < 100
    row = get(section(run).tables, "safeguards/suspicious").rows[0]
    right = sum(r["correct"] for r in sampled(path))
    steps = [r["step"] for r, e in zip(sampled(path), expected, strict=True) if e]
    texts = [r["text"] for r, e in zip(sampled(path), expected, strict=True) if e]
    assert row[1:] == (sum(expected), pytest.approx(sum(expected) / right), f"steps {steps[0]} to {steps[-1]}", texts[-1])


def test_the_same_answer_for_many_prompts(tmp_path):
    path = write(tmp_path / "r", steps=10, answer=lambda rng, prompt, right: f" {int(prompt[-2:]) % 12}" if right else "no\n")
    prompts, expected = defaultdict(set), []
    for r in sampled(path):
        if r["correct"] == 1:
            prompts[r["text"].strip()].add(r["prompt_id"])
    for r in sampled(path):
        expected.append(r["correct"] == 1 and len(prompts[r["text"].strip()]) >= 5)
    run = read(path)
    assert same_rows(run, right_rows(run)).tolist() == expected and any(expected)
    assert sum(expected) < right_rows(run).sum(), "some answers are right for fewer prompts"
    assert get(section(run).tables, "safeguards/suspicious").rows[1][1] == sum(expected)


def test_divergence_and_marker_rows(tmp_path):
    path = write(
        tmp_path / "r",
        steps=60,
        problems=240,
        held_out=150,
        held_out_skill=lambda level, step: 0.8 - 0.01 * step,
        answer=lambda rng, prompt, right: "GOLD" if right else "lead",
    )
    rows = get(section(read(path)).tables, "safeguards/suspicious").rows
    assert rows[2][1] == 1 and "of 150 problems" in rows[2][4]
    reward = [r["reward/mean"] for r in metrics(path)[1:]]
    tests = [pq.read_table(path / "evaluations" / f"{s:06d}.parquet")["correct"].to_pylist() for s in (0, 10, 50, 60)]
    before, after = (mean([*a, *b]) for a, b in (tests[:2], tests[2:]))
    assert f"reward {mean(reward[:15]):.3g} to {mean(reward[45:]):.3g}, accuracy {before:.1%} to {after:.1%}" in rows[2][4]
    assert rows[3][1] > 50 and rows[3][2] == 1.0 and rows[3][4] == "'GOLD'" and "precision 100.0%" in rows[3][3]


def test_grpo_has_no_replay_settings(tmp_path):
    rows = get(section(read(write(tmp_path / "r", steps=2, algorithm="grpo"))).tables, "safeguards/settings").rows
    assert not [r for r in rows if r[0].startswith(("replay.", "weight."))]


def test_runs_without_much(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("seed: 0\n")
    found = section(read(tmp_path / "empty"))
    assert [t.id for t in found.tables] == ["safeguards/settings"] and found.notes and not found.figures
    assert all(r[2] is None for r in found.tables[0].rows)
    one = section(read(write(tmp_path / "one", steps=1, skill=lambda level, step: 0.0)))
    assert [t.id for t in one.tables] == [f"safeguards/{n}" for n in ("settings", "verdicts", "failures", "suspicious")]
    assert get(one.tables, "safeguards/suspicious").rows[0][1:] == (0, None, "", "")


def test_scores_that_are_not_numbers(tmp_path):
    path = write(tmp_path / "r", steps=2)
    nan = [float("nan")] * 32
    for step in (1, 2):
        put(path, step, score=nan, correct=nan, reason=["verifier error: no"] * 32)
    found = section(read(path))
    assert get(found.tables, "safeguards/verdicts").rows == (("verifier error: no", "math", 64, 1.0, None),)
    assert get(found.tables, "safeguards/failures").rows[3] == ("exception", 64, 1.0)
