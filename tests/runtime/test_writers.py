from __future__ import annotations

import errno
import json
import struct
import sys
from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
import pytest

from popo_jax.runtime.writers import Loggers, MetricsFile, ParquetFiles, new_run_dir
from popo_jax.types import UserError


def test_rows_are_lines_and_nan_is_null(tmp_path):
    m = MetricsFile(tmp_path / "m.jsonl")
    m.append({"step": 0, "a": float("nan"), "b": np.float32(1.5), "c": np.int64(3), "d": float("inf"), "e": None})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 0, "a": null, "b": 1.5, "c": 3, "d": null, "e": null}\n'


def test_rewind_moves_later_rows_and_a_torn_line(tmp_path):
    m, gone = MetricsFile(tmp_path / "m.jsonl"), tmp_path / "discarded"
    for step in range(5):
        m.append({"step": step})
    with (tmp_path / "m.jsonl").open("a") as f:
        f.write('{"step": 5, "a": 0.1')
    assert [r["step"] for r in m.rows()] == [0, 1, 2, 3, 4]
    m.rewind(2, gone)
    assert [r["step"] for r in m.rows()] == [0, 1, 2]
    assert (gone / "metrics-000002.jsonl").read_text().splitlines() == ['{"step": 3}', '{"step": 4}', '{"step": 5, "a": 0.1']
    m.append({"step": 3})
    m.rewind(2, gone)
    assert json.loads((gone / "metrics-000002-2.jsonl").read_text()) == {"step": 3}
    before = m.path.read_bytes()
    m.rewind(2, gone)
    assert m.path.read_bytes() == before and len(list(gone.iterdir())) == 2


def test_parquet_files_and_their_rewind(tmp_path):
    p = ParquetFiles(tmp_path / "samples")
    for step in (1, 2, 3):
        p.write(step, {"text": ["a", "\ud800"], "score": [1.0, float("nan")]})
    got = pq.read_table(tmp_path / "samples" / "000002.parquet").to_pydict()
    assert got["text"] == ["a", "\\ud800"] and got["score"][0] == 1.0
    p.rewind(1, tmp_path / "discarded")
    assert [x.name for x in (tmp_path / "samples").iterdir()] == ["000001.parquet"]
    assert sorted(x.name for x in (tmp_path / "discarded" / "samples-000001").iterdir()) == ["000002.parquet", "000003.parquet"]


def test_a_run_directory_in_use_is_refused(tmp_path):
    assert new_run_dir(tmp_path / "new" / "run").is_dir()
    assert new_run_dir(tmp_path / "new" / "run").is_dir()  # empty
    (tmp_path / "new" / "run" / "x").write_text("kept")
    with pytest.raises(UserError, match="must be new or empty"):
        new_run_dir(tmp_path / "new" / "run")
    assert (tmp_path / "new" / "run" / "x").read_text() == "kept"


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    m = MetricsFile(tmp_path / "m.jsonl")
    m.append({"step": 0})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"m.jsonl: the disk is full"):
        m.append({"step": 1})
    monkeypatch.undo()
    assert m.rows()[0] == {"step": 0}


def test_a_missing_logger_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"tensorboardX must be installed.*popo-jax\[loggers\]"):
        Loggers(("tensorboard",), tmp_path, {})


def test_tensorboard_holds_the_finite_numbers(tmp_path):
    """Read from its own file: records of a length, its check, an event, the event's check."""
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2

    log = Loggers(("tensorboard",), tmp_path, {})
    log.log(3, {"a": 1.5, "b": float("nan"), "c": None, "n": 2})
    log.log(4, {"a": 2.5})
    log.close()
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    data, at, seen = file.read_bytes(), 0, []
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
        seen += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
        at += 16 + size
    assert sorted(seen) == [("a", 3, 1.5), ("a", 4, 2.5), ("n", 3, 2.0)]


def leveldb_log(data: bytes, at: int) -> Iterator[bytes]:
    """Records of a log in LevelDB's format that begins `at` bytes into a file: blocks of 32 KiB, chunks of checksum, length and
    kind (1 whole, 2 first, 3 middle, 4 last)."""
    i, parts = 0, b""
    while i + 7 <= len(data):
        if (left := 32768 - (at + i) % 32768) < 7:
            i += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, i)
        parts += data[i + 7 : i + 7 + size]
        i += 7 + size
        if kind in (1, 4):
            yield parts
            parts = b""


def test_wandb_holds_the_finite_numbers_and_the_config(tmp_path, monkeypatch):
    """Offline: read from its own file, with nothing sent."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = Loggers(("wandb",), tmp_path, {"seed": 7, "optim": {"learning_rate": 0.5}})
    log.log(3, {"a": 1.5, "b": float("nan"), "c": None})
    log.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows, config = [], {}
    for data in leveldb_log(file.read_bytes()[7:], 7):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
        if record.WhichOneof("record_type") == "run":
            config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
    (row,) = rows
    assert row["a"] == 1.5 and row["_step"] == 3 and not {"b", "c"} & set(row)
    assert config["seed"] == 7 and config["optim"] == {"learning_rate": 0.5}
