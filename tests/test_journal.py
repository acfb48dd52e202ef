"""What a run writes down for its report: columns of the data, answers to held-out problems, lines of health."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from popo_jax import cli, launch, problems
from popo_jax.evaluate import Answers
from popo_jax.health import RULES, Watch, crossings
from popo_jax.journal import evaluated
from popo_jax.types import Prompt, UserError, Verdict
from tests import tiny
from tests.killable import lucky


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two tasks, each with columns of its own; 2 steps, then 1 more after a resume."""
    folder = tmp_path_factory.mktemp("journal")
    patch = pytest.MonkeyPatch()
    patch.setattr(launch, "Graders", lucky)
    patch.setenv("POPO_CACHE", str(folder / "cache"))
    level = [{"nums": [i, 1], "target": i + 1, "level": None if i == 3 else i % 2} for i in range(2, 40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(p) + "\n" for p in level))
    (folder / "test.jsonl").write_text("".join(json.dumps(p | {"target": p["target"] - 2}) + "\n" for p in level))
    files = {"train_file": str(folder / "train.jsonl"), "eval_file": str(folder / "test.jsonl")}
    tasks = [{"name": "countdown", "slices": ["level", "size"], **files}]
    tasks += [{"name": "arithmetic", "slices": ["signs"], "arithmetic": {"train_problems": 64, "eval_problems": 16}}]
    (folder / "c.yaml").write_text(yaml.safe_dump(tiny.BASE | {"steps": 2, "tasks": tasks, "checkpoint": {"every": 1}}))
    assert cli.main(["train", str(folder / "c.yaml"), "--run-dir", str(folder / "run")]) == 0
    assert cli.main(["train", "--resume", str(folder / "run"), "--from-step", "1", "--steps", "3"]) == 0
    yield folder / "run"
    patch.undo()


def test_samples_carry_the_columns_that_the_config_names(run):
    found = {}
    for file in sorted((run / "samples").glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            mine = {k: v for k, v in row.items() if k.startswith("slice/")}
            assert set(mine) <= {"slice/level", "slice/size", "slice/signs"}
            for k, v in mine.items():
                assert (v is None) == ((k == "slice/signs") != (row["task"] == "arithmetic"))
                found.setdefault(k, set()).add(v)
    assert found["slice/size"] - {None} == {"2"}
    assert found["slice/level"] - {None} <= {"0", "1", "none"} and len(found["slice/level"] - {None}) >= 2


def test_evaluations_hold_every_answer_and_make_the_accuracy(run):
    rows = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    scored = [r for r in rows if r.get("eval/accuracy") is not None]
    files = {int(f.stem): pq.read_table(f).to_pylist() for f in (run / "evaluations").glob("*.parquet")}
    assert sorted(files) == [r["step"] for r in scored] and len(files) >= 2
    for r in scored:
        table = files[r["step"]]
        assert np.mean([a["correct"] for a in table]) == pytest.approx(r["eval/accuracy"], abs=1e-6)
        for task in ("countdown", "arithmetic"):
            right = [a["correct"] for a in table if a["task"] == task]
            assert np.mean(right) == pytest.approx(r[f"eval/{task}/accuracy"], abs=1e-6)
    asked = [[(a["prompt_id"], a["sample"]) for a in t] for t in files.values()]
    assert all(a == asked[0] for a in asked)


def test_each_start_is_a_session(run):
    rows = [json.loads(x) for x in (run / "sessions.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1]
    assert all(r["devices"]["count"] >= 1 and r["packages"]["jax"] and r["code"] for r in rows)


def test_what_was_evaluated_beyond_a_resumed_step_is_moved_away(run):
    assert any(p.name.startswith("samples") for p in (run / "discarded").iterdir())
    assert not [p for p in (run / "evaluations").iterdir() if int(p.stem) > 3]


def test_a_column_that_no_problem_has_is_refused():
    c = tiny.config(tasks=[{"name": "countdown", "slices": ["levle"]}])
    with pytest.raises(UserError, match=r"must have a column levle \(slices of task countdown\), got .*nums"):
        problems.load(c, tiny.TOKENIZER)


def test_answers_are_laid_out_problem_by_problem():
    prompts = [Prompt(f"p{i}", "math", "?", np.array([1], np.int32), {}, slices={"level": str(i)}) for i in range(2)]
    verdicts = tuple(Verdict(float(i), float(i), f"r{i}") for i in (0, 1, 1, 0))
    a = Answers(tuple(prompts), ("a", "b", "c", "d"), verdicts, np.array([[0, 1], [1, 0]], np.float32),
                np.array([1, 2, 3, 4], np.int32), np.array([True, False, True, True]), 5)  # fmt: skip
    got = evaluated(a)
    assert got["prompt_id"] == ["p0", "p0", "p1", "p1"] and got["sample"] == [0, 1, 0, 1]
    assert got["correct"] == [0, 1, 1, 0] and got["slice/level"] == ["0", "0", "1", "1"] and got["text"] == ["a", "b", "c", "d"]


def rows_of(key, values):
    return [{"step": i + 1, key: v} for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("key", "values", "name", "first"),
    [
        ("groups/all_wrong", [0.9] * 3 + [1.0] * 7, "dead-verifier", 8),
        ("replay/age_mean", [None] * 10 + [10.0] * 10, "staleness", 15),
        ("entropy", [1.0] * 10 + [0.05] * 30, "entropy-collapse", 20),
        ("update/nonfinite", [0.0] * 5 + [1.0], "nonfinite", 6),
        ("grad_norm", [1.0] * 6 + [20.0] * 5, "gradient-spike", 9),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_line_is_crossed_where_the_mean_of_the_last_rows_is_beyond_it(key, values, name, first):
    rows = rows_of(key, values)
    (found,) = crossings(rows)
    assert (found.rule.name, found.first) == (name, first), found
    watch = Watch()
    said = [(r["step"], c.rule.name) for r in rows for c in watch.see(r)]
    assert said == [(first, name)], "once, at the same step"


def test_steady_runs_cross_nothing_and_every_rule_can_speak():
    steady = {r.key: (r.limit * 0.5 if r.when == "above" else r.limit + 0.5) for r in RULES if not r.relative}
    assert not crossings([{"step": i} | steady | {"entropy": 0.7, "grad_norm": 1.0} for i in range(60)])
    for rule in RULES:
        base = 1.0 if rule.relative else rule.limit
        bad = rule.limit * base if rule.relative else rule.limit
        bad = bad * 2 + 0.1 if rule.when == "above" else bad / 2
        values = ([base] * rule.window if rule.relative else []) + [bad] * 30
        (found,) = crossings(rows_of(rule.key, values), [rule])
        assert "{" not in found.sentence and found.worst == pytest.approx(bad)


def test_weights_that_are_all_one_excuse_old_groups():
    rows = [{"step": i, "replay/age_mean": 12.0, "weight/ess": 1.0} for i in range(30)]
    assert not crossings(rows)
    assert [c.rule.name for c in crossings([r | {"weight/ess": 0.8} for r in rows])] == ["staleness"]


def test_a_crossed_line_is_told_on_the_console(capsys):
    from popo_jax.runtime.console import Console

    Console().warn(7, "groups are [bold]old", "lower replay.max_age")
    assert "step    7  worry: groups are [bold]old. Try: lower replay.max_age" in capsys.readouterr().out
