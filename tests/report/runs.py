"""Run directories made by a little model of a run, so that a test knows what must be found in them.

A problem of slice s is solved with probability skill(s, step); groups with a mixed outcome are effective; others are replaced by
the newest stored group, if there is one. Everything is written as the trainer writes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

LEVELS = ("1", "2", "3")


def gains(level: str, step: int) -> float:
    """Easy problems are learned first."""
    start = {"1": 0.5, "2": 0.3, "3": 0.1}[level]
    return min(start + 0.004 * step, 0.95)


def write(
    path: Path,
    *,
    steps: int = 40,
    prompts: int = 8,
    group: int = 4,
    problems: int = 60,
    held_out: int = 60,
    every: int = 10,
    seed: int = 0,
    algorithm: str = "popo",
    skill: Callable[[str, int], float] = gains,
    held_out_skill: Callable[[str, int], float] | None = None,
    trained: tuple[str, ...] = LEVELS,
    answer: Callable[[np.random.Generator, str, bool], str] | None = None,
    entropy: Callable[[int], float] = lambda step: 0.7 - 0.004 * step,
    age: int = 1,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """A finished run. answer: (draw, prompt id, right) -> text. age: of every replayed group. more: keys of every metrics row."""
    rng, tested = np.random.default_rng(seed), held_out_skill or skill
    path.mkdir(parents=True)
    for folder in ("samples", "replays", "evaluations", "checkpoints"):
        (path / folder).mkdir()
    config = {
        "fingerprints": {"data": "d" * 16, "template": "e" * 16, "reward": "f" * 16, "tokenizer": "a" * 16, "code": "0.1.0"},
        "algorithm": {"name": algorithm},
        "seed": seed,
        "steps": steps,
        "tasks": [{"name": "math", "weight": 1.0, "slices": ["level"]}],
        "batch": {"prompts": prompts, "group_size": group, "mini_batches": 1},
        "sample": {"temperature": 1.0, "max_prompt_tokens": 32, "max_response_tokens": 64},
        "loss": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None, "kl_coef": 0.0, "overlong": "keep"},
        "weight": {"cap": 2.0, "level": "token"},
        "replay": {"capacity": 4 * prompts, "min_age": 1, "max_age": 8, "max_uses": 4},
        "optim": {"learning_rate": 1e-4},
        "eval": {"every": every, "problems": held_out, "samples": 1, "temperature": 0.6},
        "policy": {"path": None},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    session = {"began": "2026-11-25T07:00:00+00:00", "step": 0, "code": "0.1.0", "source": "0" * 16, "git": "c" * 40}
    session |= {"python": "3.11.7", "platform": "Linux", "packages": {"jax": "0.10.2", "jaxlib": "0.10.2", "numpy": "2.4.6"}}
    session |= {"devices": {"platform": "cpu", "kind": "cpu", "count": 2, "processes": 1}, "cpu": "AMD EPYC", "cores": 2}
    session |= {"memory_gb": 24.0, "command": ["popo", "train", "config.yaml"]}
    (path / "sessions.jsonl").write_text(json.dumps(session) + "\n")
    text = answer or (lambda rng, prompt, right: f"so \\boxed{{{prompt[-2:] if right else rng.integers(100)}}}")
    rows, stored, total, tokens = [], [], 0, 0
    everything = [(f"train-{LEVELS[i % 3]}-{i:02d}", LEVELS[i % 3]) for i in range(problems)]
    everything = [p for p in everything if p[1] in trained]
    tests = [(f"test-{LEVELS[i % 3]}-{i:02d}", LEVELS[i % 3]) for i in range(held_out)]

    def evaluate(step: int) -> float:
        columns: dict[str, list[Any]] = {}
        for id_, level in tests:
            right = bool(rng.random() < tested(level, step))
            row = {"task": "math", "prompt_id": id_, "prompt": f"What is {id_}?", "sample": 0, "text": text(rng, id_, right)}
            row |= {"score": float(right), "correct": float(right), "reason": "right" if right else "wrong"}
            row |= {"response_tokens": int(rng.integers(5, 30)), "ended": True, "slice/level": level}
            for k, v in row.items():
                columns.setdefault(k, []).append(v)
        pq.write_table(pa.table(columns), path / "evaluations" / f"{step:06d}.parquet")
        return float(np.mean(columns["correct"]))

    rows.append({"step": 0, "eval/accuracy": evaluate(0), "eval/math/accuracy": None, "time/eval": 0.5})
    for step in range(1, steps + 1):
        columns, signals, old = {}, [], list(stored)
        for p in range(prompts):
            id_, level = everything[int(rng.integers(len(everything)))]
            right = rng.random(group) < skill(level, step)
            mean, std = right.mean(), right.std(ddof=1)
            signal = "effective" if 0 < mean < 1 else "all_right" if mean else "all_wrong"
            signals.append(signal)
            gid = (step - 1) * prompts + p
            if signal == "effective":
                stored.append((gid, step))
            for g in range(group):
                length = int(rng.integers(5, 30))
                row = {"group_id": gid, "row": g, "task": "math", "prompt_id": id_, "prompt": f"What is {id_}?"}
                row |= {"text": text(rng, id_, bool(right[g])), "score": float(right[g]), "correct": float(right[g])}
                row |= {"reason": "right" if right[g] else "wrong", "prompt_tokens": 9, "response_tokens": length}
                row |= {"advantage": float((right[g] - mean) / (std + 1e-6)) if signal == "effective" else 0.0}
                row |= {"ended": True, "signal": signal, "slice/level": level}
                for k, v in row.items():
                    columns.setdefault(k, []).append(v)
        pq.write_table(pa.table(columns), path / "samples" / f"{step:06d}.parquet")
        places = [s for s, signal in enumerate(signals) if signal != "effective"] if algorithm.startswith("popo") else []
        fit = [g for g, at in reversed(old) if step - at >= age][: len(places)]
        places = places[: len(fit)]
        kind = {"slot": pa.array(places, pa.int64()), "group_id": pa.array(fit, pa.int64())}
        pq.write_table(pa.table(kind | {"age": pa.array([age] * len(fit), pa.int64())}), path / "replays" / f"{step:06d}.parquet")
        total, tokens = total + prompts * group, tokens + int(sum(columns["response_tokens"]))
        share = {f"groups/{k}": signals.count(k) / prompts for k in ("effective", "all_right", "all_wrong", "invalid")}
        bad = prompts - signals.count("effective")
        row = {
            "step": step,
            "rollouts_total": total,
            "tokens_generated_total": tokens,
            "reward/mean": float(np.mean(columns["score"])),
        }
        row |= {"accuracy/train": float(np.mean(columns["correct"]))} | share
        row |= {"response/length": float(np.mean(columns["response_tokens"])), "response/truncated": 0.0}
        row |= {"replay/filled": len(fit), "replay/unfilled": bad - len(fit) if algorithm.startswith("popo") else 0}
        row |= {
            "replay/size": min(len(stored), 4 * prompts),
            "replay/age_mean": age if fit else None,
            "replay/age_max": age if fit else None,
        }
        far = {
            "weight/mean": 1.0,
            "weight/max": 1.5 + age,
            "weight/ess": 0.97,
            "weight/capped": 0.001,
            "kl/behaviour_replayed": 0.01,
        }
        row |= far if fit else dict.fromkeys(far)
        row |= {"mismatch/mean": 3e-7, "mismatch/max": 2e-6, "kl/proximal": 1e-4, "entropy": entropy(step), "loss": 0.01}
        row |= {"clip/low_fresh": 0.001, "clip/high_fresh": 0.002, "clip/low_replayed": 0.01, "clip/high_replayed": 0.001}
        row |= {"grad_norm": 1.0 + rng.random() / 5, "update_norm": 0.02, "update/skipped": 0.0, "update/nonfinite": 0.0}
        row |= {
            "learning_rate": 1e-4,
            "time/sample": 0.3,
            "time/grade": 0.05,
            "time/replay": 0.01,
            "time/update": 0.4,
            "time/step": 0.8,
        }
        if step % every == 0 or step == steps:
            row |= {"eval/accuracy": evaluate(step), "time/eval": 0.5}
        rows.append(row | dict(more or {}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    scores = [r["eval/accuracy"] for r in rows if "eval/accuracy" in r]
    summary = {"algorithm": algorithm, "seed": seed, "step": steps, "finished": True, "rollouts_total": total}
    summary |= {"tokens_generated_total": tokens, "eval/accuracy/first": scores[0], "eval/accuracy/best": max(scores)}
    summary |= {"eval/accuracy/last_two": float(np.mean(scores[-2:])), "seconds": 0.8 * steps, "code": "0.1.0", "device": "cpu"}
    (path / "summary.json").write_text(json.dumps(summary))
    return path
