"""The real trainer in several processes: the run of one, whatever their number, and across changes of it."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file

from popo_jax import cli, evaluate, problems, restore
from popo_jax.runtime.checkpoints import Checkpoints
from tests import several, tiny
from tests.killable import luck

STEPS = 8
DEVICES = 4
"""In all, however many processes share them."""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Four devices as data 2 x fsdp 2, and a policy to start from."""
    folder = tmp_path_factory.mktemp("processes")
    data = tiny.BASE | {"steps": STEPS, "mesh": {"data": 2, "fsdp": 2}, "checkpoint": {"every": 2, "keep_last": 5}}
    data |= {"batch": {"prompts": 4, "group_size": 4, "mini_batches": 2}, "optim": {"learning_rate": 1e-3}}
    data["policy"] = {"path": str(folder / "policy")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
    assert cli.main(["sft", str(folder / "tiny.yaml"), "--out", str(folder / "policy"), *UNSPLIT]) == 0
    return folder / "tiny.yaml"


UNSPLIT = ["--mesh.data", "1", "--mesh.fsdp", "1"]


def whole(config: Path, n: int) -> Path:
    """The run of n processes, made once."""
    out = config.parent / f"whole-{n}"
    if not out.exists():
        several.run(n, [str(config), "--run-dir", str(out)], devices=DEVICES // n, logs=config.parent / f"logs-{n}")
    return out


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def table(run: Path, kind: str, step: int) -> dict[str, list]:
    return pq.read_table(run / kind / f"{step:06d}.parquet").to_pydict()


def last(run: Path) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """(weights, buffer arrays) of the last checkpoint, read by one process on one device."""
    r = restore.restore(run, None)
    assert r.step == STEPS
    with Checkpoints(run / "checkpoints", keep_last=2, keep_best=1) as checkpoints:
        return [np.asarray(x) for x in jax.tree.leaves(r.state.params)], dict(checkpoints.read_replay(STEPS))


def assert_same(a: Path, b: Path) -> None:
    """Same responses, same groups replayed into the same slots, same buffer; numbers within float32 reduction error.

    Sums over the devices may be taken in another order by gloo between processes than by XLA within one: a few ulps of a
    gradient, 1e-6 of it, and as much of a step of Adam. (Here both add in the same order: no number differed at all.)
    """
    assert len(rows(a)) == len(rows(b)) == STEPS + 1
    assert sum(r.get("replay/filled") or 0 for r in rows(a)) > 3, "nothing was replayed: the test shows nothing"
    for x, y in zip(rows(a), rows(b), strict=True):
        x, y = ({k: v for k, v in r.items() if not k.startswith(("time/", "cpu/", "energy/")) and v is not None} for r in (x, y))
        assert x.keys() == y.keys()
        for key in x:
            assert x[key] == pytest.approx(y[key], rel=1e-5, abs=1e-6), (x["step"], key)
    for step in range(1, STEPS + 1):
        assert table(a, "replays", step) == table(b, "replays", step)
        assert table(a, "samples", step) == table(b, "samples", step)
    (weights_a, buffer_a), (weights_b, buffer_b) = last(a), last(b)
    for name in buffer_a:
        close = np.testing.assert_allclose if buffer_a[name].dtype == np.float32 else np.testing.assert_array_equal
        close(buffer_a[name], buffer_b[name], err_msg=name, **({"atol": 1e-5} if close is np.testing.assert_allclose else {}))
    for x, y in zip(weights_a, weights_b, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=8 * 1e-3 * 1e-4)  # of 8 steps of 1e-3


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_run_as_one(config, n):
    assert_same(whole(config, n), whole(config, 1))


@pytest.mark.slow
def test_a_chain_of_four_two_one_and_four_processes_is_the_unbroken_run(config):
    out = config.parent / "chain"
    for i, n in enumerate((4, 2, 1, 4)):
        steps = ["--steps", str(2 * (i + 1))]
        args = [str(config), "--run-dir", str(out), *steps] if i == 0 else ["--resume", str(out), *steps]
        several.run(n, args, devices=DEVICES // n, logs=config.parent / f"logs-chain-{i}")
    assert_same(out, whole(config, 1))


@pytest.mark.slow
def test_two_processes_make_the_warm_start_together(config, tmp_path, monkeypatch):
    monkeypatch.setenv("POPO_CACHE", str(tmp_path / "cache"))
    args = [str(config), "--run-dir", str(tmp_path / "run"), "--policy.path", "None", "--steps", "2"]
    several.run(2, args, devices=2, logs=tmp_path / "logs")
    (made,) = (tmp_path / "cache" / "warm_start").iterdir()
    one = load_file(config.parent / "policy" / "model.safetensors")
    for name, x in load_file(made / "model.safetensors").items():
        np.testing.assert_allclose(x, one[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_on_eight_devices_evaluates_alike_on_one(config):
    out = config.parent / "eight"
    args = [str(config), "--run-dir", str(out), "--mesh.data", "4", "--mesh.fsdp", "2", "--steps", "4"]
    several.run(4, args, devices=2, logs=config.parent / "logs-eight")
    r = restore.restore(out, None)
    assert jax.device_count() == 1 and r.step == 4
    prompts = evaluate.held_out(problems.load(r.c, r.policy.tokenizer).held_out, r.c.eval.problems)
    sampler = r.built.sampler(samples=r.c.eval.samples, temperature=r.c.eval.temperature, top_p=r.c.eval.top_p)
    answers = evaluate.answer(r.state.params, prompts, sampler, r.policy.tokenizer.decode, luck, seed=r.c.seed, version=4)
    there = rows(out)[4]["eval/accuracy"]
    assert 0 < there < 1 and evaluate.accuracy(answers)["eval/accuracy"] == there
