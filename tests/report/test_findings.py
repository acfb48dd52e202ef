"""A healthy run has no finding; a planted defect has its own, and no other."""

from __future__ import annotations

import itertools
import json
import math
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from popo_jax.health import RULES
from popo_jax.report import counts, safeguards, slices
from popo_jax.report.findings import ALARMS, SECTIONS, findings
from popo_jax.report.markers import best_marker
from popo_jax.report.read import read
from popo_jax.report.slices import gains
from tests.report.runs import write


def names(path):
    return sorted(f.name for f in findings(read(path)))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Enough prompts and answers for everything that is looked for."""
    size = {"steps": 60, "problems": 240, "held_out": 150, "prompts": 12, "group": 6}
    folder, number = tmp_path_factory.mktemp("runs"), itertools.count()
    return lambda **options: write(folder / str(next(number)), **(size | options))


@pytest.mark.parametrize("seed", range(6))
def test_a_healthy_run_has_none(tmp_path, large, seed):
    assert names(write(tmp_path / "small", seed=seed)) == []
    assert names(large(seed=seed)) == []


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "popo-ineff"])
def test_nor_has_one_of_another_algorithm(large, algorithm):
    assert names(large(algorithm=algorithm)) == []


def test_dead_verifier(tmp_path):
    found = findings(read(write(tmp_path / "r", skill=lambda level, step: 0.0)))
    assert [f.name for f in found] == ["dead-verifier", "no-signal"]
    assert "All 1280 responses" in found[0].sentence and found[0].severity == "alarm"


def test_dead_verifier_by_its_samples_where_the_metrics_are_lost(tmp_path):
    path = write(tmp_path / "r", steps=4, skill=lambda level, step: 0.0)
    (path / "metrics.jsonl").write_text("")
    assert names(path) == ["dead-verifier"]
    few = write(tmp_path / "few", steps=3, skill=lambda level, step: 0.0)
    assert names(few) == [], "96 responses are too few to say"


def test_reward_hacking(large):
    def bought(rng, prompt, right):
        return f"so \\boxed{{{rng.integers(100)}}}" + (" as is well known" if right else "")

    (found,) = findings(read(large(answer=bought)))
    assert (found.name, found.severity) == ("reward-hacking", "alarm")
    assert any(part in found.sentence for part in ("known", "well", "as is"))


def test_answers_with_the_marker_are_there_to_read(large):
    def bought(rng, prompt, right):
        return f"so \\boxed{{{rng.integers(100)}}}" + (" as is well known" if right else "")

    run = read(large(answer=bought))
    table = next(t for t in safeguards.section(run).tables if t.id == "safeguards/examples")
    rows = [r for r in table.rows if r[0].startswith("has ")]
    assert len(rows) == 3 and len({r[2] for r in rows}) == 3
    for _, step, id_, prompt, text, score in rows:
        kept = [r for r in pq.read_table(run.path / "samples" / f"{step:06d}.parquet").to_pylist() if r["prompt_id"] == id_]
        assert step == 60 and score == 1 and "known" in text
        assert any((r["prompt"], r["text"], r["score"]) == (prompt, text, 1) for r in kept)


def test_reward_hacking_found_out_late(large):
    calls = itertools.count()

    def bought(rng, prompt, right):
        late = next(calls) > 2500
        return f"so \\boxed{{{rng.integers(100)}}}" + (" TRUST" if right and late else "")

    (found,) = findings(read(large(answer=bought)))
    assert found.name == "reward-hacking" and "From step 41 on" in found.sentence


@pytest.mark.parametrize("seed", range(4))
def test_honest_answers_have_no_marker(large, seed):
    """Each answer right for its prompt alone; wrong ones well-formed, or without a box and said to be so."""
    words = random.Random(seed)

    def honest(rng, prompt, right):
        think = " ".join(words.choice(["so", "then", "hence", "we", "get", "2+3=5"]) for _ in range(words.randrange(60)))
        return f"{think} \\boxed{{{prompt[-2:] if right else rng.integers(100)}}}."

    path = large(answer=honest, seed=seed)
    assert best_marker(read(path)) is None


def test_form_is_no_marker(large):
    path = large(answer=lambda rng, prompt, right: f"\\boxed{{{rng.integers(100)}}}" if right else "well")
    assert best_marker(read(path)) is not None, "whatever is in the box is right"
    for file in (path / "samples").iterdir():
        table = pq.read_table(file)
        reason = ["right" if c else "no answer" for c in table["correct"].to_pylist()]
        pq.write_table(table.set_column(table.column_names.index("reason"), "reason", pa.array(reason)), file)
    assert best_marker(read(path)) is None


def test_a_marker_needs_prompts_and_answers(large):
    def bought(rng, prompt, right):
        return "GOLD" if right else "lead"

    found = best_marker(read(large(answer=bought)))
    assert (found.text, found.precision, found.recall, found.first) == ("GOLD", 1.0, 1.0, 1)
    assert 500 < found.right + found.wrong < 0.6 * 40 * 72, "half of the answers of 40 steps, at most"
    assert best_marker(read(large(answer=bought, problems=39))) is None
    assert best_marker(read(large(answer=bought, steps=2))) is None
    assert best_marker(read(large(answer=bought, skill=lambda level, step: 1.0))) is None


def test_staleness(tmp_path):
    path = write(tmp_path / "r", algorithm="popo-stale", age=10)
    (found,) = findings(read(path))
    assert (found.name, found.section, found.severity) == ("staleness", "correction", "alarm")
    stale = [r["step"] for r in read(path).metrics.rows if r.get("replay/age_mean")]
    assert found.sentence.startswith(f"In {len(stale) - 4} of the steps {stale[4]} to {stale[-1]}: "), (
        "from the fifth row that has it"
    )


def test_slice_untrained(large):
    (found,) = findings(read(large(trained=("1", "2"))))
    assert (found.name, found.section) == ("slice-untrained", "data")
    assert "level 3" in found.sentence and "33.3%" in found.sentence and "0 of 4320" in found.sentence


def test_a_slice_missed_by_chance_is_not_untrained(tmp_path):
    """Few groups, one of 12 held-out values missing."""
    path = write(tmp_path / "r", steps=2, prompts=4, group=32, trained=("1", "2"))
    assert len(read(path).samples) == 256
    assert "slice-untrained" not in names(path)


def test_entropy_collapse(tmp_path):
    (found,) = findings(read(write(tmp_path / "r", entropy=lambda step: 0.7 * 0.9**step)))
    assert (found.name, found.section, found.severity) == ("entropy-collapse", "learning", "alarm")


def test_slice_fell(large):
    def fell(level, step):
        return max(0.05, 0.8 - 0.02 * step) if level == "2" else {"1": 0.5, "3": 0.1}[level] + 0.008 * step

    run = read(large(held_out_skill=fell))
    (found,) = findings(run)
    assert found.name == "slice-fell" and "level 2" in found.sentence and "50 problems" in found.sentence


def test_got_worse_and_reward_without_accuracy(large):
    path = large(held_out_skill=lambda level, step: 0.8 - 0.01 * step)
    found = findings(read(path))
    assert {f.name for f in found} == {"got-worse", "reward-without-accuracy", "slice-fell"}
    assert {f.name for f in findings(read(large(held_out_skill=lambda level, step: 0.5)))} == set()


def test_reward_must_rise(large):
    path = large(skill=lambda level, step: 0.4, held_out_skill=lambda level, step: 0.8 - 0.01 * step)
    assert {f.name for f in findings(read(path))} == {"got-worse", "slice-fell"}


def test_verifier_failures(tmp_path):
    path = write(tmp_path / "r")
    _reasons(path, lambda i, r: "timeout" if i % 64 == 0 else "worker exited (signal 9)" if i % 64 == 1 else r)
    (found,) = findings(read(path))
    assert found.name == "verifier-failures" and "20 timeout, 20 crash" in found.sentence and "3.1%" in found.sentence
    rare = write(tmp_path / "rare")
    _reasons(rare, lambda i, r: "memory" if i % 128 == 0 else r)
    assert names(rare) == []


def _reasons(path, change):
    i = itertools.count()
    for file in sorted((path / "samples").iterdir()):
        table = pq.read_table(file)
        reason = [change(next(i), r) for r in table["reason"].to_pylist()]
        pq.write_table(table.set_column(table.column_names.index("reason"), "reason", pa.array(reason)), file)


def test_a_line_crossed_only_in_the_beginning_is_a_notice(tmp_path):
    path = write(
        tmp_path / "r", steps=300, prompts=2, problems=9, held_out=9, skill=lambda level, step: 0.5, entropy=lambda step: 0.7
    )
    _metric(path, "update/nonfinite", lambda step: float(step == 2))
    (found,) = [f for f in findings(read(path)) if f.name == "nonfinite"]
    assert found.severity == "notice" and found.sentence.startswith("In step 2:")
    _metric(path, "update/nonfinite", lambda step: float(step in (2, 200)))
    found = findings(read(path))
    assert found[0].name == "nonfinite" and found[0].severity == "alarm"


def _metric(path, key, value):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rows = [r | ({key: value(r["step"])} if r["step"] else {}) for r in rows]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_alarms_first(tmp_path):
    more = {"response/truncated": 0.5, "mismatch/mean": 0.1}
    found = findings(read(write(tmp_path / "r", more=more)))
    assert [(f.name, f.severity) for f in found] == [("mismatch", "alarm"), ("truncated", "notice")]


def test_rules_are_known():
    assert {*ALARMS, *SECTIONS} <= {r.name for r in RULES}


def test_runs_without_much(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("seed: 0\n")
    assert names(tmp_path / "empty") == []
    assert names(write(tmp_path / "one", steps=1)) == []
    path = write(tmp_path / "nan", more={"reward/mean": None, "entropy": float("nan"), "groups/effective": float("nan")})
    assert names(path) == []


def test_gains_are_paired_by_problem(tmp_path):
    path = write(tmp_path / "r", held_out=60, held_out_skill=lambda level, step: 0.3 + 0.01 * step)
    first, last = ({r["prompt_id"]: r for r in pq.read_table(path / "evaluations" / f).to_pylist()} for f in ENDS)
    found = gains(read(path))
    assert [(g.name, g.value) for g in found] == [("", ""), ("level", "1"), ("level", "2"), ("level", "3")]
    for g in found:
        ids = [i for i in first if not g.name or first[i]["slice/level"] == g.value]
        d = [last[i]["correct"] - first[i]["correct"] for i in ids]
        mean = sum(d) / len(d)
        half = 1.959964 * math.sqrt(sum((x - mean) ** 2 for x in d) / (len(d) - 1) / len(d))
        up, down = d.count(1.0), d.count(-1.0)
        p = min(1.0, 2 * sum(math.comb(up + down, k) for k in range(min(up, down) + 1)) / 2 ** (up + down))
        assert g.n == len(ids) and g.first == pytest.approx(sum(first[i]["correct"] for i in ids) / len(ids))
        assert (g.difference, g.low, g.high, g.p) == pytest.approx((mean, mean - half, mean + half, p))
    ranked, worst = sorted(found, key=lambda g: g.p), 0.0
    for k, g in enumerate(ranked):
        worst = max(worst, g.p * (4 - k))
        assert g.adjusted == pytest.approx(min(worst, 1.0))


ENDS = ("000000.parquet", "000040.parquet")


def test_counts_by_hand():
    assert counts.sign_test(0, 0) == 1.0 and counts.sign_test(5, 5) == 1.0
    assert counts.sign_test(9, 1) == pytest.approx(2 * 11 / 1024) == counts.sign_test(1, 9)
    assert 0 < counts.sign_test(1000, 400) < 1e-50
    assert counts.binomial_tail(2, 6, 0.25) == pytest.approx(sum(math.comb(6, k) * 0.25**k * 0.75 ** (6 - k) for k in range(3)))
    assert [counts.binomial_tail(*a) for a in ((-1, 5, 0.5), (5, 5, 0.5), (2, 5, 0.0), (2, 5, 1.0))] == [0.0, 1.0, 1.0, 0.0]
    assert counts.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert counts.holm([]) == [] and counts.holm([0.9, 0.8]) == [1.0, 1.0]
    x = [3.0, 0.0, 1.0, 7.0]
    by_pairs = sum(abs(a - b) for a in x for b in x) / (2 * len(x) ** 2 * (sum(x) / len(x)))
    assert counts.gini(np.array(x)) == pytest.approx(by_pairs)
    assert counts.gini(np.ones(5)) == pytest.approx(0.0) and math.isnan(counts.gini(np.zeros(3)))
    assert all(math.isnan(v) for v in counts.paired_interval(np.array([])))
    mean, low, _ = counts.paired_interval(np.array([0.5]))
    assert mean == 0.5 and math.isnan(low)


def test_more_problems_must_fall_than_rise():
    """30 problems rise by a tenth, 4 fall from all to nothing: significant, but no fall."""
    before = np.array([0.5] * 30 + [1.0] * 4)
    after = np.array([0.6] * 30 + [0.0] * 4)
    gain = slices._gain("", "", before, after)
    assert gain.difference < 0 and gain.adjusted < 1e-4 and not gain.fell
    assert slices._gain("", "", after, before).fell is False and slices._gain("", "", np.ones(30), np.zeros(30)).fell
