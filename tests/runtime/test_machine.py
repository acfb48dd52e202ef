"""What a run says of its machine, and energy counters."""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace

import pytest

from popo_jax.runtime import machine
from popo_jax.runtime.machine import Meter, counters_found, session


def test_a_session_is_plain_and_complete():
    row = json.loads(json.dumps(session(3, code="0.1.0", source="0" * 16)))
    assert row["step"] == 3 and row["devices"]["count"] >= 1 and row["devices"]["processes"] == 1
    assert row["packages"]["jax"] and row["cores"] >= 1 and row["memory_gb"] > 0.1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row["began"])
    assert isinstance(row["command"], list)


def test_a_commit_is_that_of_the_folder(tmp_path):
    import subprocess

    assert machine.commit(tmp_path / "none") is None
    for args in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *args], cwd=tmp_path, check=True)
    found = machine.commit(tmp_path)
    assert found is not None and re.fullmatch(r"[0-9a-f]{40}", found)
    (tmp_path / "new.txt").write_text("x")
    assert machine.commit(tmp_path) == found + "+"


def test_a_meter_counts_between_calls():
    at = {"a": 5.0, "b": 100.0}
    meter = Meter({name: lambda name=name: at[name] for name in at})
    assert meter.take() == {"energy/joules": 0.0}
    at |= {"a": 8.0, "b": 110.0}
    assert meter.take() == {"energy/joules": 13.0}
    at |= {"a": 1.0, "b": 111.0}  # a counter that began anew counts nothing
    assert meter.take() == {"energy/joules": 1.0}
    assert Meter({}).take() == {}


def test_counters_are_those_that_can_be_read(tmp_path, monkeypatch):
    for name, text in (("intel-rapl:0", "2000000"), ("intel-rapl:0:0", "1000000"), ("intel-rapl:1", "?"), ("dtpm", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(text)
    joules = SimpleNamespace(value=7000)

    def total(gpu):
        if gpu == 1:
            raise RuntimeError("not supported")
        return joules.value

    stub = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetTotalEnergyConsumption=total,
    )
    monkeypatch.setitem(sys.modules, "pynvml", stub)
    found = counters_found("cpu", 2, tmp_path)
    assert {k: f() for k, f in found.items()} == {"intel-rapl:0": 2.0}
    meter = Meter(found)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("3000000")
    assert meter.take()["energy/joules"] == pytest.approx(1.0)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.take() == {} and meter.take() == {}, "a counter that fails stops nothing"
    assert counters_found("gpu", 2, tmp_path) == {}, "one of two GPUs has no counter"
    stub.nvmlDeviceGetCount = lambda: 1
    meter = Meter(counters_found("gpu", 1, tmp_path))
    joules.value += 500
    assert meter.take()["energy/joules"] == pytest.approx(0.5)
    assert counters_found("gpu", 4, tmp_path) == {} and counters_found("tpu", 1, tmp_path) == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert counters_found("gpu", 1, tmp_path) == {}
