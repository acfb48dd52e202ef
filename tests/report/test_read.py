"""A run directory in any state is read: what is missing is named, the rest is there."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from popo_jax.report.frame import Figure, Series, to_plain
from popo_jax.report.read import read, text_hash
from popo_jax.types import UserError
from tests.report import runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return runs.write(tmp_path_factory.mktemp("made") / "run", steps=20)


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def said(run):
    return " ".join(read(run).missing)


def test_a_whole_run_lacks_nothing(whole):
    r = read(whole)
    assert r.missing == () and r.slices == ("slice/level",) and r.tasks == ("math",) and r.name == "run"
    assert r.samples.num_rows == 20 * 8 * 4 and r.evaluations.num_rows == 3 * 60
    assert r.setting("replay.max_age") == 8 and r.setting("no.such", 3) == 3
    np.testing.assert_array_equal(r.metrics.step, np.arange(21))
    assert np.isnan(r.metrics["loss"][0]) and r.metrics["loss"][1] == 0.01 and not r.metrics.has("none")
    first = pq.read_table(whole / "samples" / "000003.parquet")
    mine = r.samples.filter(pa.compute.equal(r.samples["step"], 3))
    assert mine["text_hash"].to_pylist() == [text_hash(t) for t in first["text"].to_pylist()]
    assert mine["text_chars"].to_pylist() == [len(t) for t in first["text"].to_pylist()]
    assert r.texts("samples", 3)["text"].to_pylist() == first["text"].to_pylist()


def test_a_run_that_is_still_going(run):
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"step": 21, "loss": 0.')
    for name in ("samples", "replays"):
        (run / name / ".000021.partial").write_bytes(b"PAR1")
    r = read(run)
    assert len(r.metrics.rows) == 21 and "summary.json is not there: the run is still going" in said(run)
    assert "metrics.jsonl: line 22 cannot be read" in said(run)


def test_torn_lines_bad_bytes_and_rows_without_a_step(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[4], lines[7] = lines[4][:30], '{"loss": 1}'
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n" + "\n".join([*lines, lines[9]]).encode())
    r = read(run)
    assert set(range(21)) - set(r.metrics.step.tolist()) == {4, 7}
    assert "line 1, 6 cannot be read" in said(run) and "2 rows without a step of their own" in said(run)
    assert "lacks 2 steps, the first is 4" in said(run)


def test_files_that_are_missing_or_broken(run):
    (run / "samples" / "000005.parquet").unlink()
    (run / "samples" / "000006.parquet").write_bytes(b"PAR1 and no more")
    (run / "replays" / "000007.parquet").write_bytes(b"")
    shutil.rmtree(run / "evaluations")
    r = read(run)
    assert set(range(1, 21)) - set(r.samples["step"].to_pylist()) == {5, 6}
    for sentence in (
        "samples/: 000006.parquet cannot be read",
        "samples/ lacks 2 of 20 steps, the first is 5",
        "replays/: 000007.parquet cannot be read",
        "evaluations/ has no files",
    ):
        assert sentence in said(run)


def test_an_older_format_is_filled_with_nothing(run):
    for file in (run / "samples").glob("*.parquet"):
        table = pq.read_table(file).drop_columns(["signal", "slice/level", "ended"])
        pq.write_table(table.append_column("score2", table["score"]), file)
    (run / "sessions.jsonl").unlink()
    r = read(run)
    assert r.samples["signal"].null_count == r.samples.num_rows and r.slices == ("slice/level",)  # of the evaluations
    assert "samples/ lacks ended, signal: written by an older version" in said(run) and "sessions.jsonl is not there" in said(run)


def test_columns_of_another_type_are_nothing(run):
    table = pq.read_table(run / "samples" / "000001.parquet")
    i = table.column_names.index("score")
    pq.write_table(table.set_column(i, "score", pa.array(["x"] * table.num_rows)), run / "samples" / "000001.parquet")
    scores = read(run).samples["score"].to_pylist()
    assert scores[:32] == [None] * 32 and None not in scores[32:]


def test_only_a_config_or_only_metrics(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("algorithm: {name: popo}\n")
    assert read(tmp_path / "a").samples.num_rows == 0 and "no step was finished" in said(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").write_text(json.dumps({"step": 0, "eval/accuracy": 0.5}) + "\n")
    (tmp_path / "b" / "config.yaml").write_text("{a: [")
    assert read(tmp_path / "b").metrics.last("eval/accuracy") == 0.5 and "config.yaml cannot be read" in said(tmp_path / "b")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"must be a run directory \(with config.yaml or metrics.jsonl\), got another folder"):
        read(tmp_path)
    with pytest.raises(UserError, match="got none"):
        read(tmp_path / "none")


def test_plain_is_for_json():
    figure = Figure(
        "a/b", "t", "line", "step", "y", (Series("s", np.arange(2), np.array([1.0, np.nan]), other_x={"h": [0.5, 1]}),)
    )
    got = json.loads(json.dumps(to_plain({"f": figure, "n": np.int64(3), "x": np.float32(0.5), "t": (1, "a", None)})))
    assert got["f"]["series"][0] == {
        "name": "s",
        "x": [0, 1],
        "y": [1.0, None],
        "low": None,
        "high": None,
        "other_x": {"h": [0.5, 1]},
    }
    assert got["n"] == 3 and got["x"] == 0.5 and got["t"] == [1, "a", None] and got["f"]["worry"] is None
