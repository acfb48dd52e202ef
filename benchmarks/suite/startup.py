"""From `popo train` to the first train step: a process of its own, without and with compiled programs of an earlier one.

The policy is random and given as a folder, so no warm start is in it; reading it, the data, the evaluation before training
(row 0) and the first step (row 1) are.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import yaml

import popo_jax.policy as policies
from benchmarks.suite.load import Load
from benchmarks.suite.report import Line, line
from benchmarks.suite.sizes import ROOT, TOKENIZER, Size, built
from popo_jax import plain
from popo_jax.config import Config
from popo_jax.policy import Policy
from popo_jax.types import UserError

PAIRS, WARM = 2, 2
"""Cold starts, and warm ones after each."""
LIMIT = 300.0
"""Seconds after which a start has failed."""


def run(size: Size) -> Iterator[Line]:
    """Cold (no compiled program kept) and warm, to the rows of metrics.jsonl before and after the first step."""
    if jax.default_backend() != "cpu":
        raise UserError("popo bench startup: a second process must get the device, which this one holds; measured on CPU only")
    kinds: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        config, load = write(size, Path(folder)), Load()
        for pair in range(PAIRS):
            cache = Path(folder) / f"cache-{pair}"
            for i in range(1 + WARM):
                kinds["warm" if i else "cold"].append(start(config, Path(folder) / f"run-{pair}-{i}", cache))
    others = load.others()
    for kind, times in kinds.items():
        yield line(
            f"startup/{kind}",
            size.name,
            [first_step for _, first_step in times],
            others=others,
            to_row_0_s=statistics.median(t for t, _ in times),
        )


def write(size: Size, folder: Path) -> Path:
    """A config of two steps whose policy is a folder of random weights."""
    b = built(size.train, 1)
    params = jax.device_get(b.fresh_params(jax.random.key(0)))
    policies.save(folder / "policy", Policy(b.model.c, TOKENIZER), params)
    c: Config = dataclasses.replace(
        size.train,
        steps=2,
        policy=dataclasses.replace(size.train.policy, path=str(folder / "policy")),
        eval=dataclasses.replace(size.train.eval, every=1000),
        checkpoint=dataclasses.replace(size.train.checkpoint, every=1000),
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(plain.to_plain(c)))
    return folder / "config.yaml"


def start(config: Path, run: Path, cache: Path) -> tuple[float, float]:
    """Seconds from the start of a process to rows 0 and 1 of its metrics; it is ended there."""
    command = [sys.executable, "-m", "popo_jax.cli", "train", str(config), "--run-dir", str(run)]
    began, times = time.perf_counter(), []
    with (run.parent / f"{run.name}.log").open("w+") as log:
        child = subprocess.Popen(command, cwd=ROOT, env=environment(cache), stdout=log, stderr=subprocess.STDOUT)
        try:
            while len(times) < 2:
                if rows(run) > len(times):
                    times.append(time.perf_counter() - began)
                elif child.poll() is not None or time.perf_counter() - began > LIMIT:
                    log.seek(0)
                    ended = "still running" if child.poll() is None else f"exit status {child.poll()}"
                    raise RuntimeError(f"popo train made no first step ({ended}): {log.read()[-2000:]}")
                else:
                    time.sleep(0.005)
        finally:
            child.kill()
            child.wait()
    return times[0], times[1]


def environment(cache: Path) -> Mapping[str, str]:
    """This process's, with a place of its own for compiled programs."""
    kept = {k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")}
    return kept | {"POPO_CACHE": str(cache)}


def rows(run: Path) -> int:
    """Whole lines of a run's metrics.jsonl."""
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
