"""`popo plan`: which sizes fit, what is advised, what is said. Programs of which only the memory matters stand in for libtpu's;
the slow tests compile those."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from popo_jax import cli
from popo_jax.config import Config, from_dict
from popo_jax.costs.chips import CHIPS, chip
from popo_jax.costs.count import Collective, Count
from popo_jax.model_config import ModelConfig
from popo_jax.plan import report, search
from popo_jax.plan.figures import Memory, Plan, Program, roofline
from popo_jax.rules import resolve
from popo_jax.types import UserError

MODEL = ModelConfig(vocab_size=64, layers=2, width=32, heads=4, kv_heads=2, head_dim=16, mlp=64)
GIB = 2.0**30


def config(**batch: object) -> Config:
    data: dict[str, Any] = {"batch": {"prompts": 8, "group_size": 4, **batch}, "mesh": {"fsdp": 4}}
    return resolve(from_dict(data | {"sample": {"max_prompt_tokens": 64, "max_response_tokens": 192}}))


LINE = {n: 8 + 2.0 * n for n in (1, 2, 4, 8, 16, 32)}
BENT = {1: 10.0, 2: 12.0, 4: 16.0, 8: 24.0, 16: 90.0, 32: 200.0}
LOW = {1: 10.0, 2: 14.0, 4: 18.0, 8: 30.0, 16: 50.0, 32: 99.0}
FITTING = [
    (LINE, 9, None, {1}),
    (LINE, 10, 1, {1, 2}),
    (LINE, 17, 4, {1, 2, 4}),
    (LINE, 23, 4, {1, 2, 4, 8}),  # 8 needs 24: in doubt, so it is compiled
    (LINE, 1000, 32, {1, 2, 32}),
    (BENT, 75, 8, {1, 2, 8, 16, 32}),  # the line says 32
    (LOW, 36, 8, {1, 2, 4, 8}),  # the line says 4, and 38 for 8
]


@pytest.mark.parametrize(("needs", "limit", "largest", "compiled"), FITTING)
def test_the_largest_that_fits_takes_few_compilations(needs, limit, largest, compiled):
    asked = set()

    def need(n: int) -> float:
        asked.add(n)
        return needs[n]

    assert search._largest(sorted(needs), need, limit) == largest
    assert asked == compiled


class Fake:
    """On 4 chips: the train step needs 1 GiB a row of a micro-batch, the sampler a quarter a row; half of each with remat."""

    def __init__(self, hbm: float):
        self.chip, self.devices = SimpleNamespace(hbm_bytes=hbm * GIB), [None] * 4

    def train(self, c: Config) -> Program:
        return Program(Memory(temporaries=c.batch.micro_batch * GIB * (0.5 if c.model.remat == "full" else 1)))  # type: ignore[operator]

    def sample(self, c: Config) -> dict[str, Program]:
        return {"decode": Program(Memory(cache=(c.sample.max_rows or c.rows) * GIB / 4))}

    def all(self, c: Config) -> dict[str, Program]:
        return {"train": self.train(c)} | self.sample(c)


def planned(c: Config, hbm: float) -> Plan:
    fake: Any = Fake(hbm)
    p = Plan("v5e:2x2", fake.chip, 4, c, MODEL, fake.all(c))
    found = {"batch.micro_batch": search._largest_micro(c, fake), "sample.max_rows": search._largest_rows(c, fake)}
    p.largest = {k: v for k, v in found.items() if v is not None}
    p.advice = [] if p.fits else list(search._advice(p, fake))
    return p


def test_what_is_known_already_is_not_compiled_again():
    asked = set()
    assert search._largest(sorted(LINE), lambda n: asked.add(n) or LINE[n], 45, own=8) == 16  # type: ignore[func-returns-value]
    assert asked == {1, 8, 16}
    assert search._largest(sorted(LINE), LINE.__getitem__, 23, own=8) == 4  # it does not fit, and says nothing of a line


def test_only_changes_that_make_everything_fit_are_advised():
    p = planned(config(micro_batch=16), hbm=9)
    assert not p.fits and p.largest == {"batch.micro_batch": 8, "sample.max_rows": 32}
    assert p.advice == ["--batch.micro-batch 8", "--model.remat full"]
    p = planned(config(micro_batch=8), hbm=7.5)  # the sampler's 8 GiB are too many as well: no one change helps
    assert not p.fits and p.largest == {"batch.micro_batch": 4, "sample.max_rows": 16} and p.advice == []
    p = planned(config(micro_batch=4), hbm=7.5)
    assert p.advice == ["--sample.max-rows 16"]
    assert planned(config(micro_batch=4), hbm=9).fits


def test_a_roofline_by_hand():
    """Ring: an all-reduce of 80 bytes among 4 sends 2 x 60, a gather 60, a permutation all; each so often as it runs."""
    v5p = CHIPS["v5p"]
    moved = [("all-reduce", 80, 4, 2), ("all-gather", 80, 4, 1), ("collective-permute", 10, 2, 3)]
    counted = Count(matmul=459e12, kernels=0, elementwise=0, bytes=2 * 2765e9, collectives=[Collective(*m, "") for m in moved])
    r = roofline(counted, v5p)
    assert (r.compute, r.memory) == (1.0, 2.0) and r.limit == "memory" and r.seconds == 2.0
    assert r.links == pytest.approx((2 * 120 + 60 + 30) / 600e9)


def test_what_is_printed_and_what_json_holds(capsys):
    p = planned(config(micro_batch=16), hbm=9)
    p.chip = CHIPS["v5e"]
    p.programs = {"train": Program(Memory(1, 2, 3, 4, 5), Count(matmul=1e12)), "decode": Program(Memory(), Count(bytes=1e9))}
    p.advice = ["--batch.micro-batch 8"]
    d = json.loads(json.dumps(report.as_json(p)))
    assert d["memory"]["train"]["total"] == 15 and d["train"]["hardware_flops"] == 1e12 and d["mesh"]["fsdp"] == 4
    assert d["decode"]["tokens_per_second"] == pytest.approx(32 / (1e9 / 819e9))
    n = 2 * (32 * 16 * 2 * (4 + 2) + 3 * 32 * 64) + 32 * 64  # two layers and the head, by hand
    attention = 4 * (256 * 257 // 2) * 2 * 4 * 16
    assert p.parameters == n and d["train"]["model_flops"] == 3 * 32 * (2 * 256 * n + attention) / 4
    report.show(p, Console(width=160))
    assert "It fits." in capsys.readouterr().out


@pytest.mark.parametrize("topology", ["v9:2x2", "v5p", "v5p:4xx", "v5p:4x4q"])
def test_an_unknown_topology_is_told(topology):
    with pytest.raises(UserError, match=r"--topology must be a chip \(v4, v5e, v5p, v6e\), a colon and a shape"):
        chip(topology)


@pytest.mark.parametrize("args", [[], ["x.yaml"], ["--topology", "v5p:2x2x1"]])
def test_what_is_missing_is_told(args, capsys):
    assert cli.main(["plan", *args]) == 2
    assert "popo plan: expected CONFIG --topology" in capsys.readouterr().err


def test_an_option_without_its_value_is_told(capsys):
    assert cli.main(["plan", "x.yaml", "--topology"]) == 2
    assert capsys.readouterr().err == "error: command line: popo plan: error: argument --topology: expected one argument\n"


TINY: dict[str, Any] = {
    "tasks": [{"name": "countdown"}],
    "model": {"vocab_size": 2048, "layers": 2, "width": 512, "heads": 4, "kv_heads": 2, "head_dim": 128, "mlp": 2048}
    | {"dtype": "bfloat16", "remat": "none", "head_chunk": None},
    "batch": {"prompts": 8, "group_size": 2, "mini_batches": 1, "micro_batch": 16},
    "sample": {"max_prompt_tokens": 64, "max_response_tokens": 192, "chunk": 64},
    "mesh": {"fsdp": 4},
}
UNROLLED = """
import sys, os, json, yaml
from popo_jax.config import from_dict
from popo_jax.costs.count import count
from popo_jax.costs.chips import chip
from popo_jax.costs.hlo import parse
from popo_jax.costs.kernels import kernel_flops
from popo_jax.plan import compiled, search
from popo_jax.rl.state import abstract_batch
from popo_jax.rules import resolve
c = resolve(from_dict(yaml.safe_load(sys.stdin.read())))
p = compiled.Programs(chip("v5e:2x2"), search._devices("v5e:2x2"), c.model, print)
b = p.built(c)
done = b.train_step.lower(b.abstract_state, abstract_batch(b.split, b.model.c)).compile()
c = count(parse(done.as_text()), trips=lambda i: 1.0, kernel=kernel_flops)
moved = sorted({(x.kind, x.bytes) for x in c.collectives}, key=lambda x: -x[1])
theirs = done.cost_analysis()["flops"]
print(json.dumps({"ours": c.flops - c.kernels, "theirs": theirs, "host": c.host, "unknown": c.unknown, "moved": moved}))
"""


def on_tpu(program: list[str], stdin: str = "") -> str:
    pytest.importorskip("libtpu")
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run([sys.executable, *program], env=env, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_an_unrolled_step_counts_what_the_compiler_does():
    """Two layers without remat, one micro-batch: cost_analysis() sees all of it. Nothing goes to the host, and what travels
    together is a block's weights at most, or the head's gradient: neither all weights nor a micro-batch's logits."""
    plain = TINY | {"model": TINY["model"] | {"attention": "xla"}}
    got = json.loads(on_tpu(["-c", UNROLLED], yaml.safe_dump(plain)).splitlines()[-1])
    assert got["ours"] == pytest.approx(got["theirs"], rel=0.01)
    assert got["host"] == [] and got["unknown"] == []
    block, head, logits = 512 * 512 * 2 + 512 * 256 * 2 + 3 * 512 * 2048, 2048 * 512, 16 * 256 * 2048
    most = max(2 * block, 4 * head)  # bytes: weights travel in bfloat16
    assert max(size for _, size in got["moved"]) <= 1.01 * most < min(2 * (2 * block + head), 4 * logits)


@pytest.mark.slow
def test_a_plan_from_the_command_line(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(TINY))
    out = on_tpu(["-m", "popo_jax.cli", "plan", str(tmp_path / "c.yaml"), "--topology", "v5e:2x2", "--json"])
    d = json.loads(out)
    assert d["fits"] and d["chips"] == 4 and d["train"]["host_transfers"] == []
    assert d["train"]["hardware_flops"] == pytest.approx(d["train"]["model_flops"], rel=0.15)
    assert set(d["memory"]) == {"train", "cast", "prefill", "decode", "take"} and d["largest"]["sample.max_rows"] == 16
    row = 2 * 2 * 2 * 128 * 2  # layers, k and v, heads, head_dim, bytes
    assert d["memory"]["decode"]["cache"] == pytest.approx(row * (64 + 192) * 4, rel=0.01)  # 4 rows on each chip


TORUS = """
import sys
from popo_jax.config import Config, MeshConfig
from popo_jax.plan import search
from popo_jax.runtime.mesh import mesh_of
mesh = mesh_of(Config(mesh=MeshConfig(fsdp=4, tensor=2)), search._devices("v5p:8x8x8"))
assert dict(mesh.shape) == {"data": 64, "fsdp": 4, "tensor": 2}
near = [sum(abs(x - y) for x, y in zip(a.coords, b.coords)) for a, b in mesh.devices.reshape(-1, 2)]
print(set(near))
"""


@pytest.mark.slow
def test_an_axis_of_a_torus_may_be_divided():
    """No axes of 8 x 8 x 8 chips multiply to 4 or 2: jax.make_mesh alone refuses them. Pairs along tensor are neighbours."""
    assert on_tpu(["-c", TORUS]).splitlines()[-1] == "{1}"
