"""Devices: the mesh, placing arrays on it, and the process-wide settings of jax."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from popo_jax.config import MeshConfig
from popo_jax.types import UserError


def cache_dir() -> epath.Path:
    """Where warm starts and compiled programs are kept: $POPO_CACHE, else popo_jax under the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return epath.Path(os.environ.get("POPO_CACHE") or os.path.join(base, "popo_jax"))


def start() -> None:
    """Keep compiled programs for the next process. Call once, before the first computation."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def make_mesh(c: MeshConfig) -> Mesh:
    """Axes data, fsdp, tensor over all devices. Errors: UserError if the axes do not multiply to their number."""
    devices = jax.device_count()
    data = c.data if c.data is not None else devices // (c.fsdp * c.tensor)
    if data * c.fsdp * c.tensor != devices:
        raise UserError(
            f"mesh: data x fsdp x tensor must be the number of devices ({devices}), got {data} x {c.fsdp} x {c.tensor}"
        )
    return jax.make_mesh((data, c.fsdp, c.tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def place(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Host arrays onto the mesh, every leaf by `spec`."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.device_put(x, sharding), tree)


def fetch(tree: Any) -> Any:
    """Device arrays to numpy, transfers started together."""
    jax.tree.map(lambda x: x.copy_to_host_async(), tree)
    return jax.tree.map(np.asarray, tree)
