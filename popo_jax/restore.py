"""A run's parameters without its loop: what eval and export start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
from etils import epath
from jax.sharding import Mesh

import popo_jax.policy as policies
from popo_jax import build, plain, run_dir
from popo_jax.build import Built
from popo_jax.config import Config, MeshConfig, from_dict
from popo_jax.policy import Policy
from popo_jax.rl.state import TrainState
from popo_jax.rules import resolve
from popo_jax.runtime.checkpoints import Checkpoints
from popo_jax.runtime.mesh import make_mesh
from popo_jax.types import UserError


@dataclass(frozen=True, eq=False)
class Restored:
    c: Config
    policy: Policy
    built: Built
    state: TrainState
    step: int


def load_config(path: epath.PathLike) -> Config:
    """The config of a run directory, resolved."""
    data = plain.read_mapping(path)
    data.pop("fingerprints", None)
    return resolve(from_dict(data, str(path)))


def _mesh(c: Config) -> Mesh:
    """The run's; where there are other devices than it had, the weights over all of them."""
    try:
        return make_mesh(c)
    except UserError:
        return make_mesh(replace(c, mesh=MeshConfig(fsdp=jax.device_count())))


def restore(run: epath.PathLike, step: int | None, adapt: Callable[[Config], Config] = lambda c: c) -> Restored:
    """The newest committed checkpoint of a run, or the one of `step`, on this machine's devices; its config as `adapt` has it."""
    folder = run_dir.open_existing(run).path
    c = adapt(load_config(folder / "config.yaml"))
    policy = policies.describe(folder / "policy", c)
    built = build.build(c, policy.model, eos_ids=policy.tokenizer.eos_ids, mesh=_mesh(c))
    with Checkpoints(folder / "checkpoints", keep_last=c.checkpoint.keep_last, keep_best=c.checkpoint.keep_best) as checkpoints:
        if not checkpoints.steps():
            raise UserError(f"{folder} holds no checkpoint yet")
        step = checkpoints.steps()[-1] if step is None else step
        state, _, meta = checkpoints.restore(step, built.abstract_state)
    run_dir.check_tokenizer(meta, policy.tokenizer.fingerprint(), f"checkpoint {folder / 'checkpoints' / str(step)}")
    return Restored(c, policy, built, state, step)
