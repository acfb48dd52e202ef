"""Several runs side by side, recomputed from their raw files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from popo_jax.report import compare
from popo_jax.report.read import read
from tests.report import raw, runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    how = {"steps": 20, "held_out": 30}
    return {
        (a, s): runs.write(folder / f"{a}-{s}", algorithm=a, seed=s, **how) for a in ("grpo", "dapo", "popo") for s in range(3)
    }


def test_lines_are_means_with_bands_over_seeds(made):
    section = compare.section([read(p) for p in made.values()])
    for name, key in (("accuracy", "eval/accuracy"), ("reward", "reward/mean"), ("effective", "groups/effective"),
                      ("entropy", "entropy"), ("length", "response/length")):  # fmt: skip
        figure = raw.figure(section, f"compare/{name}")
        assert [s.name for s in figure.series] == ["grpo", "dapo", "popo"]
        for s in figure.series:
            each = [dict(zip(*raw.having(made[s.name, seed], key), strict=True)) for seed in range(3)]
            assert list(s.x) == sorted(each[0])
            for i, step in enumerate(s.x):
                values = [e[step] for e in each]
                assert (s.y[i], s.low[i], s.high[i]) == (pytest.approx(np.mean(values)), min(values), max(values))
            responses = [np.mean([r.get("rollouts_total", 0) for seed in range(3) for r in raw.rows(made[s.name, seed])
                                  if r["step"] == step]) for step in s.x]  # fmt: skip
            assert s.other_x["responses"] == pytest.approx(responses)


def test_one_table_of_accuracy_responses_tokens_and_time(made):
    (table,) = compare.section([read(p) for p in made.values()]).tables
    assert table.columns == ("runs", "seeds", "accuracy", "least", "most", "responses", "tokens", "hours")
    for row in table.rows:
        last = [np.mean(raw.having(made[row[0], s], "eval/accuracy")[1][-2:]) for s in range(3)]
        assert row[1] == "0, 1, 2" and row[2:5] == (
            pytest.approx(np.mean(last)),
            pytest.approx(min(last)),
            pytest.approx(max(last)),
        )
        ends = [raw.rows(made[row[0], s]) for s in range(3)]
        assert row[5] == pytest.approx(np.mean([e[-1]["rollouts_total"] for e in ends]))
        assert row[6] == pytest.approx(np.mean([e[-1]["tokens_generated_total"] for e in ends]))
        took = [sum(r.get("time/step", r.get("time/eval", 0)) for r in e) for e in ends]
        assert row[7] == pytest.approx(np.mean(took) / 3600)


def test_runs_are_named_by_what_differs(made, tmp_path):
    def changed(name, key, value):
        path = tmp_path / name
        path.mkdir()
        config = yaml.safe_load((made["popo", 0] / "config.yaml").read_text())
        section, _, leaf = key.partition(".")
        config[section] = value if not leaf else config[section] | {leaf: value}
        (path / "config.yaml").write_text(yaml.safe_dump(config))
        (path / "metrics.jsonl").write_text(json.dumps({"step": 0, "eval/accuracy": 0.5}) + "\n")
        return read(path)

    base = read(made["popo", 0])
    assert list(compare.named([base, changed("a", "replay.max_age", 4)])) == ["popo, replay.max_age 8", "popo, replay.max_age 4"]
    assert list(compare.named([base, changed("b", "seed", 7), changed("c", "run_dir", "x")])) == ["popo"]
    section = compare.section([base, changed("d", "optim.learning_rate", 1e-3)])
    assert any("no band" in n for n in section.notes) and len(section.tables[0].rows) == 2
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("{}")
    assert len(compare.section([base, read(empty)]).tables[0].rows) == 2


def test_what_a_preset_decides_is_told_by_its_name(made):
    runs_ = [read(made["popo", 0]), read(made["grpo", 0])]
    runs_[1].config["replay"]["max_age"] = None  # type: ignore[index]
    assert list(compare.named(runs_)) == ["popo", "grpo"]


def configured(run, path, changes):
    path.mkdir()
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in changes.items():
        section, leaf = key.split(".")
        config[section][leaf] = value
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    return read(path)


def test_runs_of_other_settings_are_never_seeds_of_one_line(made, tmp_path):
    base = read(made["popo", 0])
    three = {"batch.mini_batches": 2, "eval.every": 5, "loss.clip_low": 0.1}
    other, faster = (
        configured(made["popo", 1], tmp_path / n, c) for n, c in (("other", three), ("faster", {"optim.learning_rate": 1.0}))
    )
    lines = compare.named([base, other, faster])
    assert [len(g) for g in lines.values()] == [1, 1, 1] and all("optim.learning_rate" in name for name in lines)
    assert all(name.endswith("1 more") for name in lines)
    keys = ("batch.mini_batches", "eval.every", "loss.clip_low", "optim.learning_rate", "weight.cap", "replay.max_uses")
    each = [configured(made["popo", 0], tmp_path / f"each{i}", {k: 3}) for i, k in enumerate(keys)]
    lines = compare.named([base, *each, base])
    assert sorted(len(g) for g in lines.values()) == [1] * 6 + [2] and len(lines) == 7
    assert sum("(" in name for name in lines) == 3, "names have no room for all that differs, and are told apart all the same"


def test_settings_that_differ_with_the_algorithm_are_noted(made, tmp_path):
    base, other = read(made["popo", 0]), configured(made["grpo", 0], tmp_path / "other", {"optim.learning_rate": 1.0})
    section = compare.section([base, other])
    assert [s.name for s in section.figures[0].series] == ["popo", "grpo"]
    assert any("optim.learning_rate (popo: 0.0001, grpo: 1.0)" in n for n in section.notes)
    assert not any("differ in" in n for n in compare.section([base, read(made["grpo", 0])]).notes)
