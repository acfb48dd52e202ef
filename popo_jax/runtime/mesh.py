"""Devices: the mesh, placing arrays on it, and the process-wide settings of jax."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from popo_jax.config import Config
from popo_jax.types import UserError

CPU_DEVICES = (8, 4, 2)
"""Into how many devices a CPU may be divided."""
SMALL = 10**8
"""Bytes of weights, up to which a CPU is divided: every device keeps them, their gradients and the optimizer's state."""


def cache_dir() -> epath.Path:
    """Where warm starts and compiled programs are kept: $POPO_CACHE, else popo_jax under the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return epath.Path(os.environ.get("POPO_CACHE") or os.path.join(base, "popo_jax"))


def start() -> None:
    """Keep compiled programs for the next process. Call once, before the first computation."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def make_mesh(c: Config) -> Mesh:
    """Axes data, fsdp, tensor over all devices; a CPU is divided into as many as suit `c`, if jax has not run yet.

    Errors: UserError if the axes do not multiply to the number of devices.
    """
    divide_cpu(cpu_devices(c, cores()))
    return mesh_of(c, jax.devices())


def mesh_of(c: Config, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of `c` over these devices. Errors: UserError, as `make_mesh`."""
    n, m = len(devices), c.mesh
    data = m.data if m.data is not None else n // (m.fsdp * m.tensor)
    if data * m.fsdp * m.tensor != n:
        raise UserError(f"mesh: data x fsdp x tensor must be the number of devices ({n}), got {data} x {m.fsdp} x {m.tensor}")
    axes, shape = ("data", "fsdp", "tensor"), (data, m.fsdp, m.tensor)
    try:
        return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 3, devices=devices)
    except NotImplementedError:  # no set of a torus' axes has these sizes: an axis of 8 chips divided into 4 and 2, say
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(placed, axes, axis_types=(AxisType.Auto,) * 3)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_devices(c: Config, cores: int) -> int:
    """Into how many devices a CPU is divided: what `mesh` asks for, else one for each core if the policy is small.

    The operations of a small policy's decoding are too small to be shared among cores, its rows are not: two devices on two
    cores sample 1.4 times as fast as one. Small is one made from `model`, or up to SMALL bytes of safetensors.
    """
    m = c.mesh
    fixed = m.fsdp * m.tensor
    if m.data is not None or not (c.policy.path is None or 0 < _weights(epath.Path(c.policy.path)) <= SMALL):
        return fixed * (m.data or 1)
    split = (c.rows // c.batch.mini_batches, c.batch.prompts * c.batch.group_size, c.warm_start.batch)
    fits = (n for n in CPU_DEVICES if n * fixed <= cores and all(rows % (n * m.fsdp) == 0 for rows in split))
    return fixed * next(fits, 1)


def _weights(folder: epath.Path) -> int:
    """Bytes of a policy's files; 0 where there are none."""
    return sum(f.stat().length for f in folder.glob("*.safetensors")) if folder.is_dir() else 0


def divide_cpu(n: int) -> None:
    """Have jax show the CPU as n devices. Nothing happens if jax has run or the user chose ($JAX_NUM_CPU_DEVICES, $XLA_FLAGS)."""
    chosen = jax.config.jax_num_cpu_devices > 0  # type: ignore[attr-defined]
    if chosen or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", n)
    except RuntimeError:
        return  # the backend is up


def place(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """Host arrays, the same on every process, onto the mesh by `specs`: one for all, or a tree of them.

    What has a shape and gives its part at an index, but is no array, is never made whole here.
    """
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    kinds = () if mesh.is_multi_process else (np.ndarray, np.generic, jax.Array)  # given away as they are

    def own_parts(sharding: NamedSharding, part: Any) -> Any:
        def placed(x: Any) -> Any:
            whole = isinstance(x, kinds)
            return x if whole else jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(placed, part)

    tree = jax.tree.map(own_parts, shardings, tree)
    return tree if mesh.is_multi_process else jax.device_put(tree, shardings)


def whole(tree: Any) -> Any:
    """Device arrays to numpy, on every process all of each: where other processes hold parts, all call this together."""
    parted = [x for x in jax.tree.leaves(tree) if not (x.is_fully_addressable or x.is_fully_replicated)]
    if parted:
        everywhere = NamedSharding(parted[0].sharding.mesh, PartitionSpec())
        tree = jax.device_put(tree, everywhere)
    return fetch(tree)


def fetch(tree: Any) -> Any:
    """Device arrays to numpy, transfers started together."""
    jax.tree.map(lambda x: x.copy_to_host_async(), tree)
    return jax.tree.map(np.asarray, tree)
