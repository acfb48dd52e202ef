"""Figures of the correction where files are missing, ages have gaps, or weights are not used. Curves: test_learning.py."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from popo_jax.health import BY_KEY
from popo_jax.report import correction
from popo_jax.report.read import read
from tests.report import raw, runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.write(tmp_path_factory.mktemp("made") / "run", steps=12)


def test_metrics_are_shown_without_the_replays_files(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "replays")
    section = correction.section(read(tmp_path / "run"))
    assert {f.id for f in section.figures} == {f.id for f in correction.section(read(run)).figures} - {
        "correction/age-histogram",
        "correction/uses",
    }
    assert list(raw.line(section, "correction/ess", "ESS").y) == raw.having(run, "weight/ess")[1]
    assert len(section.notes) == 1 and "replays/ has no rows" in section.notes[0]


@pytest.mark.parametrize("ages", [[1, 1, 5, 9], [3], [10, 10, 400, 33, 399], list(range(1, 61)), list(range(1, 62))])
def test_every_age_is_in_the_bin_of_its_left_edge(run, tmp_path, ages):
    shutil.copytree(run, tmp_path / "run")
    for file in (tmp_path / "run" / "replays").iterdir():
        file.unlink()
    table = {"slot": range(len(ages)), "group_id": [i // 2 for i in range(len(ages))], "age": ages}
    file = tmp_path / "run" / "replays" / "000003.parquet"
    pq.write_table(pa.table({k: pa.array(list(v), pa.int64()) for k, v in table.items()}), file)
    section = correction.section(read(tmp_path / "run"))
    figure = raw.figure(section, "correction/age-histogram")
    (found,) = figure.series
    assert figure.worry is None, "its y are counts, not ages"
    width = found.x[1] - found.x[0] if len(found.x) > 1 else 1
    assert len(found.x) <= 60 and [b - a for a, b in zip(found.x, found.x[1:], strict=False)] == [width] * (len(found.x) - 1)
    assert width == (1 if max(ages) - min(ages) < 60 else width)
    for edge, count in zip(found.x, found.y, strict=True):
        assert count == sum(edge <= a < edge + width for a in ages)
    assert sum(found.y) == len(ages)
    (times,) = raw.figure(section, "correction/uses").series
    assert dict(zip(times.x, times.y, strict=True)) == Counter(Counter(table["group_id"]).values())


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("age", "replay/age_mean"),
        ("weight-capped", "weight/capped"),
        ("ess", "weight/ess"),
        ("clip-fresh", "clip/low_fresh"),
        ("kl-proximal", "kl/proximal"),
        ("kl-behaviour", "kl/behaviour_replayed"),
        ("mismatch", "mismatch/mean"),
        ("skipped", "update/skipped"),
        ("nonfinite", "update/nonfinite"),
    ],
)
def test_a_figure_shows_its_line_of_health_and_tells_whose_it_is(run, name, key):
    figure = raw.figure(correction.section(read(run)), f"correction/{name}")
    rule = BY_KEY[key]
    assert (figure.worry.at, figure.worry.when, figure.worry.advice) == (rule.limit, rule.when, rule.advice)
    assert ("The line is for " in figure.note) == (len(figure.series) > 1)


def test_ages_are_no_worry_where_nothing_is_weighted(tmp_path):
    plus = runs.write(tmp_path / "run", steps=6, age=1, more={"weight/ess": 1.0})
    assert raw.figure(correction.section(read(plus)), "correction/age").worry is None


def test_one_step_and_nothing_finite(run, tmp_path):
    one = correction.section(read(runs.write(tmp_path / "one", steps=1)))
    assert all(len(s.y) == 1 for f in one.figures for s in f.series) and "No group was replayed" in one.notes[0]
    shutil.copytree(run, tmp_path / "nan")
    rows = [{k: v if k == "step" else float("nan") for k, v in r.items()} for r in raw.rows(run)]
    (tmp_path / "nan" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = correction.section(read(tmp_path / "nan"))
    assert {f.id for f in found.figures} == {"correction/age-histogram", "correction/uses"}
