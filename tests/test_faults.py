"""Processes of one run that are killed, stopped or asked to leave: what the others say and do, and that nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from popo_jax import cli
from tests import several, tiny
from tests.test_processes import rows

pytestmark = pytest.mark.slow

STEPS = 60
WITHIN = 60
"""Seconds in which the others must have ended."""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    data = tiny.BASE | {"steps": STEPS, "mesh": {"data": 2, "fsdp": 2}, "checkpoint": {"every": 3, "keep_last": 2}}
    data |= {"batch": {"prompts": 4, "group_size": 4}, "optim": {"learning_rate": 1e-3}, "eval": {"every": 10, "problems": 16}}
    data["policy"] = {"path": str(folder / "policy")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
    split = ["--mesh.data", "1", "--mesh.fsdp", "1"]
    assert cli.main(["sft", str(folder / "tiny.yaml"), "--out", str(folder / "policy"), *split]) == 0
    return folder / "tiny.yaml"


def four(config: Path, logs: str, *args: str) -> list[subprocess.Popen[str]]:
    return several.start(4, args, devices=1, logs=config.parent / logs)


def until(what: Callable[[], bool], started: list[subprocess.Popen[str]]) -> None:
    """Waits for it. Errors: AssertionError if the run ends before."""
    limit = time.monotonic() + several.LIMIT
    while not what():
        assert time.monotonic() < limit and all(p.poll() is None for p in started), "it ended or never came"
        time.sleep(0.02)


def steps(run: Path) -> int:
    return rows(run)[-1]["step"] if (run / "metrics.jsonl").exists() and rows(run) else -1


def worker(process: subprocess.Popen[str]) -> int:
    """The process under the command that trains."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def assert_others_ended(started: list[subprocess.Popen[str]], victim: int, logs: Path) -> None:
    others = [p for i, p in enumerate(started) if i != victim]
    began = time.monotonic()
    try:
        got = [p.wait(max(0.1, WITHIN - (time.monotonic() - began))) for p in others]
    finally:
        for p in started:
            p.kill()
    assert got == [3, 3, 3]
    for i in range(4):
        said = (logs / f"{i}.err").read_text()
        assert i == victim or "start all processes again with popo train --resume" in said, said[-2000:]


def timeless(run: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if not k.startswith(("time/", "cpu/", "energy/"))} for r in rows(run)]


def test_a_run_whose_processes_are_killed_five_times_is_the_unbroken_run(config):
    whole, run = config.parent / "whole", config.parent / "killed"
    several.run(4, [str(config), "--run-dir", str(whole)], devices=1, logs=config.parent / "logs-whole")
    rng = np.random.default_rng(int(os.environ.get("POPO_TEST_SEED", "0")))
    for i, victim in enumerate((0, 1, 2, 3, 0)):
        logs = config.parent / f"logs-kill-{i}"
        started = four(config, logs.name, *(["--resume", str(run)] if i else [str(config), "--run-dir", str(run)]))
        at = steps(run) + int(rng.integers(2, 9))
        until(lambda at=at: steps(run) >= at, started)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.2))
        os.kill(started[victim].pid if i % 2 else worker(started[victim]), signal.SIGKILL)
        assert_others_ended(started, victim, logs)
        assert steps(run) < STEPS, "it was too late: nothing was broken off"
    several.run(4, ["--resume", str(run)], devices=1, logs=config.parent / "logs-last")
    assert sum(r.get("replay/filled") or 0 for r in rows(whole)) > 10
    assert timeless(run) == timeless(whole) and len(rows(run)) == STEPS + 1


@pytest.mark.parametrize("victim", [0, 2])
def test_a_process_that_hangs_is_found(config, victim):
    run, logs = config.parent / f"stopped-{victim}", config.parent / f"logs-stop-{victim}"
    started = four(config, logs.name, str(config), "--run-dir", str(run), "--steps", "1000")
    until(lambda: steps(run) >= 3, started)
    os.kill(worker(started[victim]), signal.SIGSTOP)
    assert_others_ended(started, victim, logs)


def test_asked_to_leave_one_all_save_the_same_step(config):
    run, logs = config.parent / "asked", config.parent / "logs-asked"
    started = four(config, logs.name, str(config), "--run-dir", str(run), "--steps", "1000")
    until(lambda: steps(run) >= 4, started)
    started[2].send_signal(signal.SIGTERM)
    assert several.codes(started) == [0] * 4
    summary = json.loads((run / "summary.json").read_text())
    newest = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    assert summary["step"] == steps(run) == newest and not summary["finished"]
