"""What the study runs: tasks, algorithms as command-line settings, and the cells (task, algorithm, group size, seed) in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

TASKS = Path(__file__).parent / "tasks"
MAIN, OTHERS = "countdown-70", ("countdown-40", "countdown-90", "arithmetic")
"""All algorithms run on the first; grpo, grpo-filter, dapo and popo on the others."""

MOPPS = ("--selection.method", "mopps")
RUNNING = (*MOPPS, "--selection.prior-mean", "running")
OLD = ("--replay.min-age", "5", "--replay.max-age", "20", "--replay.capacity", "256")
EXTRA = ("--replay.extra", "16", "--batch.mini-batches", "4")
OLDER = ("--replay.min-age", "10", "--replay.max-age", "40", "--replay.capacity", "1024")
ALGORITHMS: Mapping[str, tuple[str, ...]] = {
    "grpo": ("--algorithm", "grpo"),
    "grpo-filter": ("--algorithm", "grpo-filter"),
    "dapo": ("--algorithm", "dapo"),
    "popo": ("--algorithm", "popo"),
    "popo-ineff": ("--algorithm", "popo-ineff"),
    "popo-stale": ("--algorithm", "popo-stale"),
    "popo-pi-old": ("--algorithm", "popo-pi-old"),
    "popo-behav": ("--algorithm", "popo-behav"),
    "popo-kl": ("--algorithm", "popo-kl"),
    "mopps": ("--algorithm", "grpo", *MOPPS),
    "popo+mopps": ("--algorithm", "popo", *MOPPS),
    "rloo": ("--algorithm", "grpo", "--algorithm.advantages", "rloo"),
    "popo+rloo": ("--algorithm", "popo", "--algorithm.advantages", "rloo"),
}
"""The paper's method, its baselines and its ablations."""
CANDIDATES: Mapping[str, tuple[str, ...]] = {
    "popo, variance": ("--algorithm", "popo", "--replay.quality", "variance"),
    "popo, variance, half-life 16": ("--algorithm", "popo", "--replay.quality", "variance", "--replay.half-life", "16"),
    "popo, proportional": ("--algorithm", "popo", "--replay.selection", "proportional"),
    "popo, 5 to 20 old": ("--algorithm", "popo", *OLD),
    "grpo, 4 mini-batches": ("--algorithm", "grpo", "--batch.mini-batches", "4"),
    "popo, extra slots": ("--algorithm", "popo", *EXTRA),
    "mopps, running prior": ("--algorithm", "grpo", *RUNNING),
    "popo+mopps, running prior": ("--algorithm", "popo", *RUNNING),
    "popo+mopps, running prior, extra slots": ("--algorithm", "popo", *EXTRA, *RUNNING),
    "popo, 5 to 20 old, extra slots": ("--algorithm", "popo", *OLD, *EXTRA),
    "popo+mopps, running prior, 5 to 20 old": ("--algorithm", "popo", *OLD, *RUNNING),
    "popo+mopps, running prior, 5 to 20 old, extra slots": ("--algorithm", "popo", *OLD, *EXTRA, *RUNNING),
    "mopps, running prior, 4 mini-batches": ("--algorithm", "grpo", *RUNNING, "--batch.mini-batches", "4"),
    "popo-plus": ("--algorithm", "popo-plus", "--batch.mini-batches", "4"),
    "popo-plus, clip around proximal": ("--algorithm", "popo", *OLDER, *EXTRA, *RUNNING),
    "popo-plus, clip around proximal, 2 mini-batches": ("--algorithm", "popo", *OLDER, "--replay.extra", "16", *RUNNING),
}
"""What might beat plain recency at the same rollouts (and grpo with as many updates a step, to compare with)."""
DIAGNOSES: Mapping[str, tuple[str, ...]] = {
    "grpo, short momentum": ("--algorithm", "grpo", "--optim.b1", "0.1"),
    "popo, short momentum": ("--algorithm", "popo", "--optim.b1", "0.1"),
}
"""Why plain recency changes little: does Adam's first moment (b1 0.9 elsewhere) already replay the last steps' gradients?"""
EVERY: Mapping[str, tuple[str, ...]] = {**ALGORITHMS, **CANDIDATES, **DIAGNOSES}
ADOPTED = "popo-plus"
"""What won on the main task, and is then asked to win on the others; with it, its rival."""
FINALISTS = (ADOPTED, "popo-plus, clip around proximal")
SEEDS = {"grpo": 5, "dapo": 5, "popo": 5} | dict.fromkeys(FINALISTS, 5)
"""On the main task; 3 for the rest."""
SIZES = (4, 16, 32)
"""Group sizes besides 8."""


@dataclass(frozen=True)
class Cell:
    task: str
    algorithm: str
    seed: int
    group_size: int = 8

    @property
    def name(self) -> str:
        """Of its files: letters, digits and dashes."""
        algorithm = self.algorithm.replace(", ", "--").replace(" ", "-").replace("+", "-and-")
        return f"{self.task}/{algorithm}-g{self.group_size}-s{self.seed}"

    @property
    def settings(self) -> tuple[str, ...]:
        """What follows `popo train`, the run's directory aside."""
        size = () if self.group_size == 8 else ("--batch.group-size", str(self.group_size))
        chosen = EVERY[self.algorithm]
        return (str(TASKS / f"{self.task}.yaml"), *chosen, *size, "--seed", str(self.seed))


def cells() -> list[Cell]:
    """Every cell once, those first that say most: seeds in the outer loop, so that an unfinished study is a smaller one."""
    return list(dict.fromkeys(_ordered()))


def _ordered() -> Iterator[Cell]:
    four = ("grpo", "grpo-filter", "dapo", "popo")
    for seed in range(3):
        yield from (Cell(MAIN, a, seed) for a in (*four, *EVERY))
        yield from (Cell(task, a, seed) for a in four for task in OTHERS)
        yield from (Cell(task, a, seed) for a in FINALISTS for task in OTHERS)
    yield from (Cell(MAIN, a, seed, G) for seed in range(2) for G in SIZES for a in ("grpo", "popo"))
    yield from (Cell(MAIN, a, seed) for seed in (3, 4) for a, n in SEEDS.items() if seed < n)
