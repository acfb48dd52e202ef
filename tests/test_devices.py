"""The real trainer on several devices of a CPU: the run of one device, and a checkpoint goes from one to the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from popo_jax import cli, launch
from tests import tiny
from tests.killable import lucky


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("devices") / "tiny.yaml"
    cut = tiny.BASE["batch"] | {"micro_batch": 4, "length_buckets": 3}
    path.write_text(yaml.safe_dump(tiny.BASE | {"steps": 3, "checkpoint": {"every": 1, "keep_last": 2}, "batch": cut}))
    return path


@pytest.fixture(scope="module")
def warm(config) -> Path:
    """A policy, so that both runs start from the same weights to the bit."""
    assert cli.main(["sft", str(config), "--out", str(config.parent / "policy")]) == 0
    return config.parent / "policy"


@pytest.fixture(scope="module")
def four(config, warm) -> Path:
    """A run on data 2 x tensor 2 devices, in a process of its own."""
    out = config.parent / "four"
    env = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"} | {"JAX_PLATFORMS": "cpu"}
    args = ["train", str(config), "--policy.path", str(warm), "--run-dir", str(out), "--mesh.data", "2", "--mesh.tensor", "2"]
    command = [sys.executable, "-m", "tests.killable", "never", "0", *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_four_devices_train_as_one(config, warm, four, tmp_path, monkeypatch):
    one = tmp_path / "one"
    monkeypatch.setattr(launch, "Graders", lucky)
    assert cli.main(["train", str(config), "--policy.path", str(warm), "--run-dir", str(one)]) == 0
    assert len(rows(four)) == len(rows(one)) == 4
    assert sum(row.get("replay/filled") or 0 for row in rows(one)) > 0 and rows(one)[-1]["grad_norm"] > 0.01
    for a, b in zip(rows(four), rows(one), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {k for k in a if k.startswith(("time/", "cpu/", "energy/")) or a[k] is None}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), (a["step"], key)


def test_a_checkpoint_of_four_devices_is_exported_and_goes_on_on_one(four, tmp_path, monkeypatch):
    assert cli.main(["export", str(four), "--out", str(tmp_path / "out")]) == 0  # its config's mesh is of four
    assert (tmp_path / "out" / "model.safetensors").exists()
    monkeypatch.setattr(launch, "Graders", lucky)
    args = ["--mesh.data", "1", "--mesh.tensor", "1", "--steps", "4"]
    assert cli.main(["train", "--resume", str(four), *args]) == 0
    assert [r["step"] for r in rows(four)] == [0, 1, 2, 3, 4]
