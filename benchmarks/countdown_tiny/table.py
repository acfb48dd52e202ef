"""Held-out accuracy of grpo, dapo and popo on configs/countdown_tiny.yaml, from the raw rows beside this file.

python -m benchmarks.countdown_tiny.table          (the rows: metrics.jsonl of `popo train ... --algorithm A --seed S`)
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SHOWN = (0, 40, 80, 120, 160)


def rows(algorithm: str, seed: int) -> list[dict]:
    return [json.loads(line) for line in (HERE / f"{algorithm}-s{seed}.jsonl").read_text().splitlines()]


def line(algorithm: str, seeds: list[int]) -> str:
    """One Markdown row: accuracy by seed at some steps, the mean of the last two evaluations, totals, CPU seconds."""
    runs = [rows(algorithm, s) for s in seeds]
    at = [" / ".join(f"{100 * r[n]['eval/accuracy']:.1f}" for r in runs) for n in SHOWN]
    last = [np.mean([x["eval/accuracy"] for x in r if x.get("eval/accuracy") is not None][-2:]) for r in runs]
    mean = f"{100 * np.mean(last):.1f} ({' / '.join(f'{100 * x:.1f}' for x in last)})"
    responses, tokens = (np.mean([r[-1][k] for r in runs]) for k in ("rollouts_total", "tokens_generated_total"))
    cpu = np.mean([sum(x.get("cpu/step", 0) for x in r) for r in runs])
    return f"| {algorithm} | {' | '.join(at)} | {mean} | {responses / 1e3:.1f}k | {tokens / 1e3:.0f}k | {cpu:.0f} |"


def main() -> None:
    seeds = [0, 1, 2]
    heads = [f"step {n}" for n in SHOWN]
    print(f"| algorithm | {' | '.join(heads)} | last two | responses | tokens | CPU s |")
    print("|" + "---|" * (len(SHOWN) + 5))
    for algorithm in ("grpo", "dapo", "popo"):
        print(line(algorithm, seeds))


if __name__ == "__main__":
    main()
