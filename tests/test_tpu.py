"""Compiled for TPUs that are not here: `pip install libtpu` is enough. Nothing is run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("libtpu")
pytestmark = pytest.mark.slow

COMMON = """
import sys, jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding
topology, *rest = sys.argv[1:]
devices = topologies.get_topology_desc(topology, platform="tpu").devices
"""
STEP = """
from popo_jax.build import build
from popo_jax.config import from_dict
from popo_jax.rl.state import abstract_batch
from popo_jax.rules import resolve
fsdp, tensor, T = map(int, rest)
mesh = Mesh(np.array(devices).reshape(1, fsdp, tensor), ("data", "fsdp", "tensor"))
model = {"vocab_size": 1024, "layers": 2, "width": 512, "heads": 4, "kv_heads": 2, "head_dim": 128, "mlp": 1024}
model |= {"dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full"}
batch = {"prompts": 2, "group_size": 4, "micro_batch": 4}
c = resolve(from_dict({"model": model, "batch": batch, "sample": {"max_prompt_tokens": 512, "max_response_tokens": T - 512}}))
b = build(c, c.model, eos_ids=(1,), mesh=mesh)
assert b.model.c.attention == "splash"
assert len(b.split.lengths) == 4 and b.split.micro_batches == 2
program = b.train_step.lower(b.abstract_state, abstract_batch(b.split, b.model.c)).compile()
text = program.as_text()
print("kernels", text.count("tpu_custom_call"), "scores", f"{T},{T}]" in text, program.memory_analysis())
"""
KERNEL = """
from popo_jax.models.flash import CAUSAL
where = SingleDeviceSharding(devices[0])
for B, K, R, T, H, window, dtype in (
    (2, 2, 7, 1024, 64, None, "bfloat16"),
    (1, 1, 1, 200, 60, 37, "bfloat16"),
    (1, 2, 2, 1100, 256, 700, "bfloat16"),
    (1, 1, 2, 2048, 128, None, "float32"),
):
    q, k = (jax.ShapeDtypeStruct(s, dtype, sharding=where) for s in ((B, K, R, T, H), (B, K, T, H)))
    loss = lambda *x: CAUSAL["splash"](*x, window=window, platform="tpu").astype(jnp.float32).sum()
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k).compile().as_text()
    print("kernels", text.count("tpu_custom_call"), "of", B, K, R, T, H, window, dtype, flush=True)
"""


def compiled(program: str, *args: object) -> list[list[str]]:
    """Words of the lines that start with "kernels"."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-c", COMMON + program, *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line.split() for line in done.stdout.splitlines() if line.startswith("kernels")]


@pytest.mark.parametrize(("topology", "fsdp", "tensor"), [("v5e:2x2", 4, 1), ("v5e:2x2", 2, 2), ("v5p:2x2x1", 2, 2)])
def test_the_train_step_compiles_with_splash(topology, fsdp, tensor):
    """Forward, dq and dkv in the branch of each of the four lengths; scores are made in none."""
    ((_, kernels, _, scores, *_),) = compiled(STEP, topology, fsdp, tensor, 2048)
    assert int(kernels) >= 4 * 3 and scores == "False"


def test_the_kernel_compiles_for_shapes_that_are_no_whole_tiles():
    lines = compiled(KERNEL, "v5e:2x2")
    assert len(lines) == 4 and all(int(kernels) >= 3 for _, kernels, *_ in lines)
