"""Who takes part in which case, in which environment and with which settings, and how a mode starts a process."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
OURS = "popo_jax"


@dataclass(frozen=True)
class Contestant:
    """`environment`: ours, or a folder that `install` made. The first of a case is ours at its defaults."""

    name: str
    module: str
    environment: str
    arguments: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


LARGE = str(1 << 30)
MALLOC = {"MALLOC_MMAP_THRESHOLD_": LARGE, "MALLOC_TRIM_THRESHOLD_": LARGE, "MALLOC_TOP_PAD_": str(1 << 26)}
"""glibc keeps freed memory instead of giving it back: no page faults in the next step."""
ONE_DEVICE, TWO_DEVICES = {"JAX_NUM_CPU_DEVICES": "1"}, {"JAX_NUM_CPU_DEVICES": "2"}
"""Into how many devices jax divides the CPU. By default ours takes as many as it has cores, Tunix one."""
MICRO = ("--micro-batch", "32")
"""Gradients accumulated over 4 parts of 32 rows: less memory to touch; every trainer has the setting."""


def _ours(name: str = "", *arguments: str, **variables: str) -> Contestant:
    return Contestant(f"{OURS}{name}", "benchmarks.peers.ours", "ours", arguments, variables)


def _torch(name: str = "", *arguments: str, **variables: str) -> Contestant:
    return Contestant(f"torch{name}", "benchmarks.peers.torch_step", "trl", arguments, variables)


def _trl(name: str = "", *arguments: str, **variables: str) -> Contestant:
    return Contestant(f"trl{name}", "benchmarks.peers.trl_learner", "trl", arguments, variables)


CASES: Mapping[str, tuple[Contestant, ...]] = {
    "sample": (
        _ours(),
        _ours(", one device", **ONE_DEVICE),
        Contestant("transformers", "benchmarks.peers.hf_generate", "trl"),
        Contestant("transformers, malloc", "benchmarks.peers.hf_generate", "trl", variables=MALLOC),
        Contestant("transformers, compiled", "benchmarks.peers.hf_generate", "trl", ("--cache", "static")),
        Contestant("tunix", "benchmarks.peers.tunix_sampler", "tunix"),
        Contestant("tunix, two devices", "benchmarks.peers.tunix_sampler", "tunix", variables=TWO_DEVICES),
    ),
    "train": (
        _ours(),
        _ours(", one device", **ONE_DEVICE),
        _ours(", micro-batch", *MICRO),
        _torch(),
        _torch(", malloc", **MALLOC),
        _torch(", micro-batch", *MICRO),
    ),
    "step": (
        _ours(),
        _ours(", one device", **ONE_DEVICE),
        _ours(", micro-batch", *MICRO),
        _trl(),
        _trl(", malloc", **MALLOC),
        _trl(", micro-batch", *MICRO),
        Contestant("tunix", "benchmarks.peers.tunix_learner", "tunix"),
        Contestant("tunix, micro-batch", "benchmarks.peers.tunix_learner", "tunix", MICRO),
        Contestant("tunix, micro-batch, two devices", "benchmarks.peers.tunix_learner", "tunix", MICRO, TWO_DEVICES),
    ),
}


@dataclass(frozen=True)
class Mode:
    cores: tuple[int, ...]
    """That a contestant may run on."""
    variables: Mapping[str, str]


def modes() -> dict[str, Mode]:
    """two_cores: torch's threads bound to cores; one_core: every contestant pinned to the machine's last core."""
    cores = sorted(os.sched_getaffinity(0))
    return {
        "two_cores": Mode(tuple(cores[-2:]), {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores", "OMP_NUM_THREADS": "2"}),
        "one_core": Mode((cores[-1],), {"OMP_NUM_THREADS": "1"}),
    }


_SETTINGS = (
    "OMP_",
    "GOMP_",
    "KMP_",
    "MKL_",
    "MALLOC_",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "XLA_",
    "JAX_",
    "PYTHONPATH",
    "VIRTUAL_ENV",
)


def command(c: Contestant, mode: Mode, peers: Path | None) -> list[str]:
    """Errors: ValueError for a contestant whose environment is not there."""
    python = sys.executable if c.environment == "ours" else str((peers or Path(".")) / c.environment / "bin" / "python")
    if not Path(python).exists():
        raise ValueError(f"{c.name}: no {python}; make the peers' environments with python -m benchmarks.peers.install DIR")
    pinned = ",".join(map(str, mode.cores))
    return ["taskset", "-c", pinned, python, "-m", c.module, *c.arguments]


def environment(c: Contestant, mode: Mode, cache: Path) -> dict[str, str]:
    """This process' environment without anything that would set up a contestant, then the mode's and its own variables."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_SETTINGS)}
    fixed = {
        "PYTHONPATH": str(ROOT),
        "POPO_CACHE": str(cache),
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return kept | fixed | dict(mode.variables) | dict(c.variables)
