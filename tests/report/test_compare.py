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
