"""Runs cells, each a `popo train` in a process of its own, one core each; what was finished or begun is not begun again.

Left per cell: results/<task>/<algorithm>-g<G>-s<seed>.jsonl.gz, the run's metrics.jsonl as it is, and .json beside it with
how the run ended. Run directories stay in the work folder.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from benchmarks.study.plan import Cell

RESULTS = Path(__file__).parent / "results"


def run_all(cells: Sequence[Cell], work: Path, results: Path = RESULTS, *, workers: int, more: Sequence[str] = ()) -> list[Cell]:
    """Run what is not in `results` yet, `workers` at a time; returns the cells that ended badly. `more`: further settings."""
    cores: SimpleQueue[int | None] = SimpleQueue()
    available: list[int | None] = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for i in range(workers):
        cores.put(available[i % len(available)] if available else None)

    def one(cell: Cell) -> bool:
        core = cores.get()
        try:
            return run(cell, work, results, core=core, more=more)
        finally:
            cores.put(core)

    waiting = [c for c in cells if not paths(cell=c, results=results)[1].exists()]
    with ThreadPoolExecutor(workers) as pool:
        return [cell for cell, good in zip(waiting, pool.map(one, waiting), strict=True) if not good]


def paths(cell: Cell, results: Path = RESULTS) -> tuple[Path, Path]:
    """(rows, how the run ended)."""
    base = results / cell.name
    return base.with_name(base.name + ".jsonl.gz"), base.with_name(base.name + ".json")


def run(cell: Cell, work: Path, results: Path, *, core: int | None, more: Sequence[str]) -> bool:
    """One cell to its end, resumed if its run directory holds a checkpoint. A run that stops by itself is a result too."""
    folder, log = work / cell.name, work / f"{cell.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    resumable = any(p.name.isdigit() for p in (folder / "checkpoints").glob("*"))
    if folder.exists() and not resumable:
        folder.rename(folder.with_name(f"{folder.name}.broken-{time.time_ns()}"))
    what = ("--resume", str(folder)) if resumable else (*cell.settings, "--run-dir", str(folder), *more)
    command = [sys.executable, "-m", "popo_jax.cli", "train", *what]
    pin = (lambda: os.sched_setaffinity(0, {core})) if core is not None else None
    with log.open("a") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, preexec_fn=pin).returncode
    last = log.read_text().rstrip().splitlines()[-1]
    stopped = last if code == 2 and last.startswith("error: step ") else None  # such as ten steps without a signal
    if not stopped and (code or not json.loads((folder / "summary.json").read_text())["finished"]):
        print(f"{cell.name}: exit {code}, {last}", flush=True)
        return False  # a crash or an interruption is no result; what was saved is resumed the next time
    print(f"{cell.name}: {stopped or 'done'}", flush=True)
    keep(cell, folder, results, stopped, pinned=core is not None)
    return True


def keep(cell: Cell, folder: Path, results: Path, stopped: str | None, *, pinned: bool) -> None:
    """Rows and ending into `results`, the ending last: it says that both are there."""
    rows, ending = paths(cell, results)
    rows.parent.mkdir(parents=True, exist_ok=True)
    with rows.open("wb") as f, gzip.GzipFile("", "wb", fileobj=f, mtime=0) as packed:
        packed.write((folder / "metrics.jsonl").read_bytes())
    ending.write_text(json.dumps(ending_of(cell, stopped, pinned), indent=1) + "\n")


def ending_of(cell: Cell, stopped: str | None, pinned: bool) -> dict[str, Any]:
    """What the tables say of where a figure comes from."""
    import jax

    return {
        "task": cell.name.split("/")[0],
        "algorithm": cell.algorithm,
        "group_size": cell.group_size,
        "seed": cell.seed,
        "settings": [s.removeprefix(f"{Path(__file__).parents[2]}/") for s in cell.settings],
        "stopped": stopped,
        "pinned_to_one_core": pinned,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} x {_cpu()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _commit() -> str:
    got = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return got.stdout.strip() or "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())
