from __future__ import annotations

import json
import math
import sys
import time

import pytest

from benchmarks.peers import case, contestants, load, run, table, worker

STAT = """cpu  99 99 99 99 99 99 99 99 0 0
cpu0 100 10 50 7000 600 5 5 30 40 0
cpu1 1000 0 0 9000 0 0 0 0 0 0
intr 12345
"""
FAKE = """
import os, sys, time
sys.path.insert(0, {root!r})
from benchmarks.peers.worker import Gate, serve

gate = Gate(("numpy",))
print("a library that prints")
gate.facts["case"] = gate.case
steps = 0

def step():
    global steps
    steps += 1
    os.write(1, b"a library that writes to the descriptor\\n")
    if steps == {dies}:
        sys.exit(3)
    time.sleep(0.02)
    return {tokens}

serve(gate, step)
"""


@pytest.fixture
def start(tmp_path):
    """start(tokens, dies) -> a worker whose contestant is a script; all are ended with the test."""
    started: list[run.Worker] = []

    def make(tokens: int = 96, dies: int = -1) -> run.Worker:
        script = tmp_path / f"fake{len(started)}.py"
        script.write_text(FAKE.format(root=str(contestants.ROOT), tokens=tokens, dies=dies))
        c = contestants.Contestant("fake", script.stem, "ours")
        with open(tmp_path / "log", "a") as log:
            started.append(run.start(c, [sys.executable, str(script)], {}, "train", tmp_path, log))
        return started[-1]

    yield make
    for w in started:
        w.process.kill()
        w.process.wait()


def test_a_worker_is_warm_then_counts_what_it_is_asked_for(start):
    w = start(tokens=96)
    assert w.versions.keys() == {"python", "numpy"} and w.facts == {"case": "train"}
    for steps in (1, 3):
        answer = w.ask({"steps": steps})
        assert answer["tokens"] == 96 * steps
        assert 0.02 * steps <= answer["seconds"] < 0.02 * steps + 1


def test_a_worker_waits_between_rounds_without_work(start):
    w = start()
    w.ask({"steps": 1})
    before = load.use((), [w.process.pid]).own[w.process.pid]
    time.sleep(0.5)
    assert load.use((), [w.process.pid]).own[w.process.pid] - before <= 0.02


def test_a_worker_that_ends_is_named(start):
    w = start(dies=worker.WARM + 2)
    assert w.ask({"steps": 1})["tokens"] == 96
    with pytest.raises(RuntimeError, match="fake ended with 3"):
        w.ask({"steps": 1})


def test_rounds_take_turns_and_refuse_missing_tokens(start, monkeypatch):
    mode = contestants.Mode((0,), {})
    monkeypatch.setattr(run, "await_quiet", lambda *_: True)
    monkeypatch.setattr(run, "LIMIT", 2.0)
    workers = [start(tokens=run.TOKENS["train"]), start(tokens=run.TOKENS["train"])]
    turns = list(run.rounds(workers, mode, "train", 2, math.inf))
    assert [(w, row["cycle"]) for w, row in turns] == [(w, n) for n in (0, 1) for w in workers]
    assert all(row["kept"] and row["tokens"] == case.TRAIN_ROWS * 96 for _, row in turns)
    short = start(tokens=run.TOKENS["train"] - 1)
    with pytest.raises(ValueError, match="fake must handle 12288 tokens a step, got 12287"):
        list(run.rounds([short], mode, "train", 1, math.inf))


def test_a_disturbed_round_is_written_down_and_tried_again(start, monkeypatch):
    shares = iter([(0.5, 0.0), (0.01, 0.0)])
    monkeypatch.setattr(load, "shares", lambda *_, **__: next(shares))
    monkeypatch.setattr(run, "await_quiet", lambda *_: True)
    w = start(tokens=run.TOKENS["train"])
    rows = [row for _, row in run.rounds([w], contestants.Mode((0,), {}), "train", 1, math.inf)]
    assert [row["kept"] for row in rows] == [False, True]


def test_other_processes_share():
    assert load.busy(STAT, (0,)) == pytest.approx(200 / load.TICK)  # idle, iowait and guest left out, stolen time in
    assert load.busy(STAT, (0, 1)) == pytest.approx(1200 / load.TICK)
    stat = "77 (a (b) c) S 1 77 77 0 -1 4194304 900 0 0 0 250 50 7 7 20 0 1 0 100 1 1"
    assert load.process(stat) == pytest.approx(300 / load.TICK)
    before, after = load.Use(10.0, {1: 0.0, 2: 5.0}), load.Use(14.0, {1: 3.0, 2: 5.2})
    assert load.shares(before, after, running=1, idle=[2], seconds=2.0, cores=2) == pytest.approx((0.25, 0.05))


def test_contestants_that_compute_something_else_are_refused():
    def entry(norm: float) -> run.Worker:
        return run.Worker(contestants.Contestant("other", "", ""), None, {}, {"loss_and_norm": [(0.5, norm)]})  # type: ignore[arg-type]

    run.check([entry(2.0), entry(2.0 * (1 + 0.9 * case.AGREE))])
    with pytest.raises(ValueError, match="other: loss and norm"):
        run.check([entry(2.0), entry(2.0 * (1 + 1.1 * case.AGREE))])


def test_a_contestants_settings_are_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    mode = contestants.modes()["one_core"]
    c = contestants.Contestant("x", "m", "ours", ("--y",), {"A": "b"})
    env = contestants.environment(c, mode, tmp_path)
    assert env["OMP_NUM_THREADS"] == "1" and "MALLOC_TOP_PAD_" not in env and env["A"] == "b"
    assert contestants.command(c, mode, None) == ["taskset", "-c", str(mode.cores[0]), sys.executable, "-m", "m", "--y"]
    with pytest.raises(ValueError, match=r"benchmarks\.peers\.install"):
        contestants.command(contestants.Contestant("x", "m", "trl"), mode, tmp_path)


def row(contestant: str, cycle: int, seconds: float, kept: bool = True) -> dict:
    common = {"case": "sample", "mode": "one_core", "tokens": 4096, "peak_mb": 10.0}
    return common | {"contestant": contestant, "cycle": cycle, "seconds": seconds, "kept": kept}


def test_table_takes_kept_rounds_medians_and_ratios_within_cycles():
    ours = [row("popo_jax", 0, 1.0), row("popo_jax", 1, 2.0), row("popo_jax", 2, 4.0)]
    peers = [row("transformers", 0, 3.0), row("transformers", 1, 99.0, kept=False), row("transformers", 1, 5.0)]
    text = table.table([*ours, *peers])
    assert "| sample | one pinned core | popo_jax | 2.000 (1.000 - 4.000) | 2048 | 10 | 3 of 3 |  |  |  |" in text
    theirs = "| sample | one pinned core | transformers | 4.000 (3.000 - 5.000) | 1024 | 10 | 2 of 3 "
    assert f"{theirs}| 2.00 (2.50 - 3.00) |  | 1.3 / 1.6 |" in text


def test_results_text_is_the_table_of_the_committed_rows():
    rows = table.read()
    text = table.SHOWN.read_text()
    assert table.replaced(text, rows) == text, "run python -m benchmarks.peers.table"
    for r in rows:
        assert r["kept"] == (r["others"] <= run.LIMIT) and r["tokens"] == run.TOKENS[r["case"]]
        assert r["versions"] and r["date"] and r["commit"]
    assert json.dumps(rows, allow_nan=False)
