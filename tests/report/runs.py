"""Run directories made by a little model of a run, so that a test knows what must be found in them.

A problem of slice s is solved with probability skill(s, step); groups with a mixed outcome are effective; others are replaced by
the newest stored group, if there is one. Everything is written as the trainer writes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

LEVELS = ("1", "2", "3")
STEADY = {
    "mismatch/mean": 3e-7,
    "mismatch/max": 2e-6,
    "kl/proximal": 1e-4,
    "loss": 0.01,
    "learning_rate": 1e-4,
    "clip/low_fresh": 0.001,
    "clip/high_fresh": 0.002,
    "clip/low_replayed": 0.01,
    "clip/high_replayed": 0.001,
    "update_norm": 0.02,
    "update/skipped": 0.0,
    "update/nonfinite": 0.0,
    "time/sample": 0.3,
    "time/grade": 0.05,
    "time/replay": 0.01,
    "time/update": 0.4,
    "time/step": 0.8,
}
"""What every row has."""
SESSION = {
    "began": "2026-11-25T07:00:00+00:00",
    "step": 0,
    "code": "0.1.0",
    "source": "0" * 16,
    "git": "c" * 40,
    "python": "3.11.7",
    "platform": "Linux",
    "packages": {"jax": "0.10.2", "jaxlib": "0.10.2", "numpy": "2.4.6"},
    "devices": {"platform": "cpu", "kind": "cpu", "count": 2, "processes": 1},
    "cpu": "AMD EPYC",
    "cores": 2,
    "memory_gb": 24.0,
    "command": ["popo", "train", "config.yaml"],
}


def gains(level: str, step: int) -> float:
    """Easy problems are learned first."""
    start = {"1": 0.5, "2": 0.3, "3": 0.1}[level]
    return min(start + 0.004 * step, 0.95)


def boxed(rng: np.random.Generator, prompt: str, right: bool) -> str:
    return f"so \\boxed{{{prompt[-2:] if right else rng.integers(100)}}}"


@dataclass(eq=False)
class Made:
    """The settings of a run that is made, and what it has sampled so far."""

    path: Path
    steps: int = 40
    prompts: int = 8
    group: int = 4
    problems: int = 60
    held_out: int = 60
    every: int = 10
    seed: int = 0
    algorithm: str = "popo"
    skill: Callable[[str, int], float] = gains
    held_out_skill: Callable[[str, int], float] | None = None
    trained: tuple[str, ...] = LEVELS
    answer: Callable[[np.random.Generator, str, bool], str] | None = None
    """(draw, prompt id, right) -> text."""
    entropy: Callable[[int], float] = lambda step: 0.7 - 0.004 * step
    age: int = 1
    """Of every replayed group."""
    more: Mapping[str, Any] | None = None
    """Keys of every metrics row."""
    stored: list[tuple[int, int]] = field(default_factory=list)
    """(group, step) of the effective ones."""
    tokens: int = 0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def config(self) -> dict[str, Any]:
        names = {"data": "d", "template": "e", "reward": "f", "tokenizer": "a"}
        return {
            "fingerprints": {k: 16 * v for k, v in names.items()} | {"code": "0.1.0"},
            "algorithm": {"name": self.algorithm},
            "seed": self.seed,
            "steps": self.steps,
            "tasks": [{"name": "math", "weight": 1.0, "slices": ["level"]}],
            "batch": {"prompts": self.prompts, "group_size": self.group, "mini_batches": 1},
            "sample": {"temperature": 1.0, "max_prompt_tokens": 32, "max_response_tokens": 64},
            "loss": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None, "kl_coef": 0.0, "overlong": "keep"},
            "weight": {"cap": 2.0, "level": "token"},
            "replay": {"capacity": 4 * self.prompts, "min_age": 1, "max_age": 8, "max_uses": 4},
            "optim": {"learning_rate": 1e-4},
            "eval": {"every": self.every, "problems": self.held_out, "samples": 1, "temperature": 0.6},
            "policy": {"path": None},
        }

    def answered(self, id_: str, level: str, right: bool) -> dict[str, Any]:
        """What samples and evaluations say of one answer."""
        text = (self.answer or boxed)(self.rng, id_, right)
        row = {"task": "math", "prompt_id": id_, "prompt": f"What is {id_}?", "text": text, "slice/level": level, "ended": True}
        reason = "right" if right else "wrong"
        return row | {
            "score": float(right),
            "correct": float(right),
            "reason": reason,
            "response_tokens": int(self.rng.integers(5, 30)),
        }

    def evaluate(self, step: int) -> float:
        """The accuracy of an evaluation, which is written."""
        rows = []
        for i in range(self.held_out):
            level = LEVELS[i % 3]
            right = bool(self.rng.random() < (self.held_out_skill or self.skill)(level, step))
            rows.append(self.answered(f"test-{level}-{i:02d}", level, right) | {"sample": 0})
        self.write("evaluations", step, rows)
        return float(np.mean([r["correct"] for r in rows]))

    def sample(self, step: int) -> tuple[list[dict[str, Any]], list[str]]:
        """(rows of samples/, the signal of each group) of a step."""
        rows, signals = [], []
        levels = [(f"train-{LEVELS[i % 3]}-{i:02d}", LEVELS[i % 3]) for i in range(self.problems)]
        levels = [p for p in levels if p[1] in self.trained]
        for p in range(self.prompts):
            id_, level = levels[int(self.rng.integers(len(levels)))]
            right = self.rng.random(self.group) < self.skill(level, step)
            mean, std = right.mean(), right.std(ddof=1)
            signal = "effective" if 0 < mean < 1 else "all_right" if mean else "all_wrong"
            signals.append(signal)
            number = (step - 1) * self.prompts + p
            if signal == "effective":
                self.stored.append((number, step))
            for g in range(self.group):
                adv = float((right[g] - mean) / (std + 1e-6)) if signal == "effective" else 0.0
                own = {"group_id": number, "row": g, "prompt_tokens": 9, "advantage": adv, "signal": signal}
                rows.append(self.answered(id_, level, bool(right[g])) | own)
        return rows, signals

    def replay(self, step: int, signals: Sequence[str], old: Sequence[tuple[int, int]]) -> int:
        """How many slots a stored group filled; which is written."""
        places = [s for s, signal in enumerate(signals) if signal != "effective"] if self.algorithm.startswith("popo") else []
        fit = [g for g, at in reversed(old) if step - at >= self.age][: len(places)]
        table = {"slot": places[: len(fit)], "group_id": fit, "age": [self.age] * len(fit)}
        pq.write_table(
            pa.table({k: pa.array(v, pa.int64()) for k, v in table.items()}), self.path / "replays" / f"{step:06d}.parquet"
        )
        return len(fit)

    def step(self, step: int) -> dict[str, Any]:
        """A step's row of the metrics; its files are written."""
        old = list(self.stored)
        rows, signals = self.sample(step)
        self.write("samples", step, rows)
        filled = self.replay(step, signals, old)
        self.tokens += sum(r["response_tokens"] for r in rows)
        row: dict[str, Any] = {
            "step": step,
            "rollouts_total": step * self.prompts * self.group,
            "tokens_generated_total": self.tokens,
        }
        row |= {f"groups/{k}": signals.count(k) / self.prompts for k in ("effective", "all_right", "all_wrong", "invalid")}
        means = {"reward/mean": "score", "accuracy/train": "correct", "response/length": "response_tokens"}
        row |= {k: float(np.mean([r[of] for r in rows])) for k, of in means.items()} | {"response/truncated": 0.0}
        bad = self.prompts - signals.count("effective")
        row |= {"replay/filled": filled, "replay/unfilled": bad - filled if self.algorithm.startswith("popo") else 0}
        row |= {"replay/size": min(len(self.stored), 4 * self.prompts)}
        far = {"weight/mean": 1.0, "weight/max": 1.5 + self.age, "weight/ess": 0.97, "weight/capped": 0.001}
        far |= {"kl/behaviour_replayed": 0.01, "replay/age_mean": self.age, "replay/age_max": self.age}
        row |= far if filled else dict.fromkeys(far)
        row |= STEADY | {"entropy": self.entropy(step), "grad_norm": 1.0 + self.rng.random() / 5}
        if step % self.every == 0 or step == self.steps:
            row |= {"eval/accuracy": self.evaluate(step), "time/eval": 0.5}
        return row | dict(self.more or {})

    def write(self, folder: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        pq.write_table(pa.Table.from_pylist(list(rows)), self.path / folder / f"{step:06d}.parquet")


def write(path: Path, **settings: Any) -> Path:
    """A finished run with the settings of `Made`."""
    made = Made(path, **settings)
    path.mkdir(parents=True)
    for folder in ("samples", "replays", "evaluations", "checkpoints"):
        (path / folder).mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(made.config(), sort_keys=False))
    (path / "sessions.jsonl").write_text(json.dumps(SESSION) + "\n")
    rows: list[dict[str, Any]] = [{"step": 0, "eval/accuracy": made.evaluate(0), "eval/math/accuracy": None, "time/eval": 0.5}]
    rows += [made.step(i) for i in range(1, made.steps + 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    scores = [r["eval/accuracy"] for r in rows if "eval/accuracy" in r]
    summary = {
        "algorithm": made.algorithm,
        "seed": made.seed,
        "step": made.steps,
        "finished": True,
        "tokens_generated_total": made.tokens,
    }
    summary |= {
        "eval/accuracy/first": scores[0],
        "eval/accuracy/best": max(scores),
        "eval/accuracy/last_two": float(np.mean(scores[-2:])),
    }
    summary |= {
        "rollouts_total": rows[-1].get("rollouts_total", 0),
        "seconds": 0.8 * made.steps,
        "code": "0.1.0",
        "device": "cpu",
    }
    (path / "summary.json").write_text(json.dumps(summary))
    return path
