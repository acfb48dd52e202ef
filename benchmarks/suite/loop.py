"""The whole loop: a POPO step against a GRPO step, one compiled train step, turn about.

The verifier really runs; then a coin decides, since a random policy is always wrong: half of the groups are mixed.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.suite.load import Load
from benchmarks.suite.report import Line, line
from benchmarks.suite.sizes import TOKENIZER, Size, built
from popo_jax import problems, train
from popo_jax.build import Built
from popo_jax.config import AlgorithmConfig
from popo_jax.data.stream import PromptStream
from popo_jax.journal import Journal
from popo_jax.replay.buffer import Buffer
from popo_jax.rl.rollout import Collector
from popo_jax.rl.state import TrainState
from popo_jax.run_dir import Progress, RunDir
from popo_jax.runtime.clocks import Clock
from popo_jax.runtime.console import Console
from popo_jax.runtime.writers import Loggers
from popo_jax.tasks.pool import grade_all
from popo_jax.types import Verdict

STEPS, SKIPPED = 3, 2
"""Steps of one algorithm before the other has its turn; steps of each that are in no statistic."""


@dataclass(eq=False)
class Going:
    """A run that is continued by turns."""

    parts: train.Parts
    state: TrainState
    progress: Progress

    def go_on(self, steps: int) -> None:
        c = dataclasses.replace(self.parts.c, steps=self.progress.step + steps)
        self.parts = dataclasses.replace(self.parts, c=c)
        self.state, self.progress = train.loop(self.parts, self.state, self.progress)

    def rows(self) -> Sequence[Mapping[str, Any]]:
        return self.parts.journal.run.metrics.rows()[SKIPPED:]


def run(size: Size) -> Iterator[Line]:
    """Seconds a step, CPU seconds of POPO's over GRPO's, the share of fill, assemble and store."""
    b = built(size.train, jax.device_count())
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: begin(b, name, Path(folder) / name) for name in ("grpo", "popo")}
        for going in runs.values():
            going.go_on(SKIPPED)
        load, began = Load(), time.perf_counter()
        for turn in itertools.count():
            for going in runs.values():
                going.go_on(STEPS)
            if turn >= 1 and time.perf_counter() - began > 2 * size.seconds:
                break
        others, rows = load.others(), {name: going.rows() for name, going in runs.items()}
    cpu = {name: statistics.median(r["cpu/step"] for r in got) for name, got in rows.items()}
    for name, got in rows.items():
        tokens = float(np.mean([r["response/length"] for r in got])) * b.c.rows
        yield line(
            f"loop/{name}",
            size.name,
            [r["time/step"] for r in got],
            tokens=round(tokens),
            others=others,
            cpu_s=cpu[name],
            cpu_of_grpo=cpu[name] / cpu["grpo"],
            replay_of_cpu=statistics.median(r["cpu/replay"] / r["cpu/step"] for r in got),
            replayed=float(np.mean([r["replay/filled"] for r in got])),
            **{f"{k}_s": statistics.median(r[f"time/{k}"] for r in got) for k in ("sample", "grade", "replay", "update")},
        )


def begin(b: Built, algorithm: str, folder: Path) -> Going:
    """A run at step 0, assembled as `launch` does, without evaluations and checkpoints."""
    c = dataclasses.replace(b.c, algorithm=AlgorithmConfig(algorithm))
    folder.mkdir()
    where = RunDir.at(folder)
    stream = PromptStream(problems.load(c, TOKENIZER).train, seed=c.seed)
    collect = Collector(c, b.rollout_sampler(), coin(c.batch.group_size), TOKENIZER.decode, stream, None, None, Clock)
    journal = Journal(where, Loggers((), where.path, {}), Console(quiet=True))
    nothing = lambda *_: None  # noqa: E731
    parts = train.Parts(c, b, collect, Buffer(c.replay), None, lambda *_: {}, journal, Clock(), nothing, lambda: False)
    return Going(parts, b.state(b.fresh_params(jax.random.key(0))), Progress())


def coin(G: int) -> Callable[[Any], list[Verdict]]:
    """Grades in earnest, then gives every other group mixed verdicts and makes the others wrong."""
    rng = np.random.default_rng(0)

    def grade(jobs: Any) -> list[Verdict]:
        right = rng.permuted(np.tile(np.arange(G) % 2, (len(jobs) // G, 1)), axis=1)
        right[1::2] = 0
        return [
            dataclasses.replace(v, score=float(x), correct=float(x)) for v, x in zip(grade_all(jobs), right.flat, strict=True)
        ]

    return grade
