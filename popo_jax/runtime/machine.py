"""What a run runs on, and the energy that its devices count."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "transformers", "math-verify"),
    *("pyarrow", "libtpu"),
)
POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows a CPU's energy counters, in microjoules."""


def session(step: int, *, code: str, source: str) -> dict[str, Any]:
    """A row of sessions.jsonl: the trainer was started here, from `step`. `code`: the package's version, `source`: its digest."""
    devices = jax.devices()
    found = {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else None
    return {
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "code": code,
        "source": source,
        "git": commit(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: v for name in PACKAGES if (v := _version(name)) is not None},
        "devices": found | {"processes": jax.process_count()},
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": memory,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def commit(folder: Path) -> str | None:
    """The git commit that a source tree stands on, "+" behind it if files differ; None where there is none."""
    try:
        how: dict[str, Any] = {"cwd": folder, "capture_output": True, "text": True, "timeout": 10, "check": True}
        head = subprocess.run(["git", "rev-parse", "HEAD"], **how).stdout.strip()
        return head + ("+" if subprocess.run(["git", "status", "--porcelain", "--", "."], **how).stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class Meter:
    """`take` answers what the energy counters of this host counted since it was last called."""

    def __init__(self, counters: Mapping[str, Callable[[], float]]) -> None:
        """counters: name -> joules so far. What goes backwards has begun anew, and counts nothing."""
        self._counters = dict(counters)
        self._last = self._read()

    def take(self) -> dict[str, float]:
        """`energy/joules`; nothing where no counter is readable, or one fails: then none is read again."""
        now = self._read()
        if not now:
            return {}
        used = sum(max(now[name] - self._last[name], 0.0) for name in now)
        self._last = now
        return {"energy/joules": used}

    def _read(self) -> dict[str, float]:
        try:
            return {name: read() for name, read in self._counters.items()}
        except Exception:  # whatever a driver raises: training goes on without
            self._counters = {}
            return {}


def counters_found(platform: str, devices: int, powercap: Path = POWERCAP) -> dict[str, Callable[[], float]]:
    """Of jax's devices: on "gpu" those of NVML (nvidia-ml-py), if it counts as many; on "cpu" of the packages (Linux powercap).

    What else runs on them is counted, too. Other platforms, and hosts with more GPUs than the run has, have none.
    """
    found: dict[str, Callable[[], float]] = {}
    if platform == "gpu":
        with contextlib.suppress(Exception):  # no library, no driver, a GPU without a counter: NVML has an error for each
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            for i in range(nvml.nvmlDeviceGetCount()):
                gpu = nvml.nvmlDeviceGetHandleByIndex(i)
                nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
                found[f"gpu-{i}"] = lambda gpu=gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3  # type: ignore[misc]
        return found if len(found) == devices else {}
    if platform != "cpu":
        return {}
    with contextlib.suppress(OSError):
        for file in sorted(powercap.glob("intel-rapl:[0-9]*/energy_uj")):
            if file.parent.name.count(":") == 1:  # a package; its parts are counted in it
                with contextlib.suppress(OSError, ValueError):
                    _microjoules(file)
                    found[file.parent.name] = lambda file=file: _microjoules(file)  # type: ignore[misc]
    return found


def _microjoules(file: Path) -> float:
    return int(file.read_text()) / 1e6
