"""A run that was stopped or killed ends as if it had not been: parameters, buffer, metrics rows, to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from popo_jax import cli, launch, plain, restore
from popo_jax.runtime.checkpoints import Checkpoints
from tests import tiny
from tests.killable import lucky

STEPS, EVERY = 8, 2


VARIANTS = {
    "uniform": {"replay": {"max_uses": 2}},
    "mopps, extra slots": {"replay": {"max_uses": 2, "extra": 2}, "selection": {"method": "mopps", "candidates": 2}},
    "pictures": {
        **{k: plain.nest({n.replace("__", "."): v for n, v in tiny.SEES.items()})[k] for k in ("tasks", "model")},
        "sample": {"max_prompt_tokens": 24, "max_response_tokens": 24, "chunk": 8},
        "replay": {"max_uses": 2},
    },
}


@pytest.fixture(scope="module", params=[pytest.param(v, marks=pytest.mark.slow if v == "pictures" else ()) for v in VARIANTS])
def config(tmp_path_factory, request) -> Path:
    folder = tmp_path_factory.mktemp("config")
    os.environ["POPO_CACHE"] = str(folder / "cache")
    data = plain.merge(tiny.BASE | {"steps": STEPS, "checkpoint": {"every": EVERY, "keep_last": 2}}, VARIANTS[request.param])
    data["batch"] = {"prompts": 4, "group_size": 4, "mini_batches": 2}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
    return folder / "tiny.yaml"


def train_here(monkeypatch, *args: str) -> None:
    monkeypatch.setattr(launch, "Graders", lucky)
    assert cli.main(["train", *args]) == 0


def start(config: Path, point: str, step: int, *args: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.killable", point, str(step), "train", *args]
    env = os.environ | {"POPO_CACHE": str(config.parent / "cache")}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, code: int) -> None:
    _, err = process.communicate(timeout=300)
    assert process.returncode == code, err[-2000:]


def outcome(run: Path) -> tuple[list[np.ndarray], dict[str, np.ndarray], list[dict]]:
    """(state, buffer arrays, metrics rows without times) after the last step."""
    r = restore.restore(run, None)
    assert r.step == STEPS
    with Checkpoints(run / "checkpoints", keep_last=2, keep_best=1) as checkpoints:
        replay = dict(checkpoints.read_replay(STEPS))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in row.items() if not k.startswith(("time/", "cpu/", "energy/", "images/"))} for row in rows]
    return [np.asarray(x) for x in jax.tree.leaves(r.state)], replay, timeless


def assert_same(run: Path, whole: Path) -> None:
    (a, buffer_a, rows_a), (b, buffer_b, rows_b) = outcome(run), outcome(whole)
    assert rows_a == rows_b and [r["step"] for r in rows_a] == list(range(STEPS + 1))
    assert sum(r.get("replay/filled") or 0 for r in rows_a) > 3, "nothing was replayed: the test shows nothing"
    assert buffer_a.keys() == buffer_b.keys()
    for name in buffer_a:
        np.testing.assert_array_equal(buffer_a[name], buffer_b[name], err_msg=name)
    assert len(a) == len(b) > 10
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
    for kind in ("samples", "replays"):
        names = [p.name for p in sorted((whole / kind).iterdir())]
        assert [p.name for p in sorted((run / kind).iterdir())] == names


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    finish(start(config, "never", 0, str(config), "--run-dir", str(run)), 0)
    return run


def test_stopped_and_resumed_equals_unbroken(config, whole, tmp_path, monkeypatch):
    """SIGTERM in step 3 saves and exits 0; --resume ends where the unbroken run ended."""
    run = tmp_path / "run"
    monkeypatch.setenv("POPO_CACHE", str(config.parent / "cache"))
    from popo_jax import train

    real = train.store

    def store(parts, rollout, plan, out, order, version):
        if version == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(parts, rollout, plan, out, order, version)

    monkeypatch.setattr(train, "store", store)
    train_here(monkeypatch, str(config), "--run-dir", str(run))
    assert json.loads((run / "summary.json").read_text())["step"] == 3
    monkeypatch.setattr(train, "store", real)
    train_here(monkeypatch, "--resume", str(run))
    assert_same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "step", "committed"), [("mid-step", 5, 4), ("mid-save", 4, 2), ("before-commit", 4, 2), ("after-commit", 4, 4)]
)
def test_killed_at_a_named_point(config, whole, tmp_path, point, step, committed):
    run = tmp_path / "run"
    finish(start(config, point, step, str(config), "--run-dir", str(run)), -signal.SIGKILL)
    with Checkpoints(run / "checkpoints", keep_last=2, keep_best=1) as checkpoints:
        newest = checkpoints.steps()[-1]
    assert newest == committed or (point == "mid-save" and newest in (2, 4))  # the save may win the race
    finish(start(config, "never", 0, "--resume", str(run)), 0)
    assert_same(run, whole)
    if point in ("mid-step", "before-commit"):
        rewound = json.loads((run / "metrics.jsonl").read_text().splitlines()[committed + 1])
        assert rewound["step"] == committed + 1
    if point == "before-commit":
        assert any((run / "discarded").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_a_random_time(config, whole, tmp_path, seed):
    run, rng = tmp_path / "run", np.random.default_rng(seed)
    process = start(config, "never", 0, str(config), "--run-dir", str(run))
    deadline = time.monotonic() + 120
    while not any(p.name.isdigit() for p in (run / "checkpoints").glob("*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(float(rng.uniform(0, 1.0)))
    process.kill()
    process.communicate()
    finish(start(config, "never", 0, "--resume", str(run)), 0)
    assert_same(run, whole)
