"""The real trainer on 8 devices of a CPU, split in four ways, against one device: 5 steps of POPO."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from popo_jax import cli, restore
from popo_jax.models import hf
from tests import several, tiny
from tests.test_processes import UNSPLIT, rows, table

pytestmark = pytest.mark.slow

STEPS, RATE = 5, 1e-3
MESHES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2), "1x2x4": (1, 2, 4)}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("meshes")
    data = tiny.BASE | {"steps": STEPS, "checkpoint": {"every": 5, "keep_last": 1}, "optim": {"learning_rate": RATE}}
    data |= {"model": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 4, "head_dim": 8, "mlp": 64}}
    data |= {"batch": {"prompts": 64, "group_size": 4, "mini_batches": 2, "micro_batch": 32, "length_buckets": 2}}
    data["policy"] = {"path": str(folder / "policy")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(data))
    assert cli.main(["sft", str(folder / "tiny.yaml"), "--out", str(folder / "policy"), *UNSPLIT]) == 0
    return folder / "tiny.yaml"


def trained(config: Path, mesh: tuple[int, int, int]) -> Path:
    """The run on that mesh, made once."""
    out = config.parent / "x".join(map(str, mesh))
    if not out.exists():
        axes = [f"--mesh.{name}={n}" for name, n in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
        devices = int(np.prod(mesh))
        several.run(1, [str(config), "--run-dir", str(out), *axes], devices=devices, logs=config.parent / f"logs-{out.name}")
    return out


def texts(run: Path) -> list[str]:
    """Everything that was sampled."""
    return [text for n in range(1, STEPS + 1) for text in table(run, "samples", n)["text"]]


def weights(run: Path) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(restore.restore(run, None).state.params)]


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_a_mesh_trains_as_one_device_does(config, mesh):
    """A float32 sum over 8 devices is taken in another order than on one: a few units in the last place (6e-8 of the largest
    term) for each of the log2(8) + 2 sums on the way, 1e-6 of a gradient. Adam divides by the gradient's own size: a weight moves
    by RATE a step whatever its gradient, and by 1e-3 of that otherwise where the gradient is a thousandth of the largest."""
    one, split = trained(config, (1, 1, 1)), trained(config, mesh)
    differ = np.mean([a != b for a, b in zip(texts(one), texts(split), strict=True)])
    worst = max(float(np.abs(a - b).max()) for a, b in zip(weights(one), weights(split), strict=True))
    moved = max(float(np.abs(a - b).max()) for a, b in zip(weights(one), weights_before(config), strict=True))
    print(f"{mesh}: {100 * differ:.2f} % of the sampled rows differ; weights differ by {worst:.1e}, and moved by {moved:.1e}")
    assert len(texts(one)) == 1280 and differ == 0.0  # with a tensor axis, too: no two scores were as near as the sums differ
    assert sum(r.get("replay/filled") or 0 for r in rows(one)) > 3 and moved > RATE
    for x, y in zip(rows(one), rows(split), strict=True):
        for key in ("loss", "grad_norm", "entropy", "kl/proximal", "weight/mean", "replay/filled"):
            if x.get(key) is not None:
                assert x[key] == pytest.approx(y[key], rel=1e-4, abs=1e-6), (x["step"], key)
    assert worst <= 1e-3 * 2 * STEPS * RATE


def weights_before(config: Path) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(hf.load(config.parent / "policy", hf.read_config(config.parent / "policy")))]
