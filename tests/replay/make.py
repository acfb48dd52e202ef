"""Random groups for tests: any shape, every per-token value its own, so that a mixed-up field shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from popo_jax.config import ReplayConfig
from popo_jax.types import Group, Signal

CORRECT: dict[str, Sequence[float]] = {"effective": (1, 0), "all_right": (1,), "all_wrong": (0,), "invalid": (np.nan,)}


def group(
    id: int, *, version: int = 0, signal: Signal = "effective", G: int = 4, T: int = 12, ref: bool = False, **fields: Any
) -> Group:
    """G rows of 2 to T tokens: one prompt, then sampled responses with a hole now and then. `fields` replace what is made."""
    rng = np.random.default_rng([id, version])
    prompt = int(rng.integers(1, T - 1))
    lengths = rng.integers(prompt + 1, T + 1, G).astype(np.int32)
    N, start = int(lengths.sum()), np.cumsum(lengths) - lengths
    position = np.arange(N) - np.repeat(start, lengths)
    sampled = (position >= prompt) & ((position == prompt) | (rng.random(N) < 0.9))
    ended = rng.random(G) < 0.8
    correct = np.resize(np.array(CORRECT[signal], np.float32), G)
    values: dict[str, Any] = {
        "prompt_id": f"problem-{id}",
        "task": "countdown",
        "lengths": lengths,
        "tokens": rng.integers(1, 1000, N).astype(np.int32),
        "sampled_mask": sampled,
        "token_mask": sampled & np.repeat(ended | (np.arange(G) == 0), lengths),
        "logp_sampler": np.where(sampled, -rng.exponential(size=N), 0).astype(np.float32),
        "score": correct,
        "correct": correct,
        "adv": np.nan_to_num(correct - correct.mean()).astype(np.float32),
        "ended": ended,
        "logp_ref": -rng.exponential(size=N).astype(np.float32) if ref else None,
        "texts": tuple(f"text {id} {g}" for g in range(G)),
        "reasons": ("scripted",) * G,
    }
    return Group(id=id, version=version, signal=signal, **(values | fields))


def batch(signals: Sequence[Signal], *, version: int, first_id: int | None = None, **kw: Any) -> list[Group]:
    """One fresh group per signal, ids counting up from `first_id` (100 * version if None)."""
    first = 100 * version if first_id is None else first_id
    return [group(first + s, version=version, signal=signal, **kw) for s, signal in enumerate(signals)]


def logp_start(P: int, *, G: int = 4, T: int = 12, seed: int = 0) -> np.ndarray:
    """float32 [P*G, T], every entry its own."""
    return -np.random.default_rng(seed).exponential(size=(P * G, T)).astype(np.float32)


def config(**fields: Any) -> ReplayConfig:
    """Resolved; capacity 16 unless told."""
    return ReplayConfig(**({"capacity": 16, "candidates": 16} | fields))


def same(a: Group, b: Group) -> bool:
    """Equal to the bit in every field, dtypes and absence included."""
    for name in a.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
            if x.dtype != y.dtype or x.shape != y.shape or x.tobytes() != y.tobytes():
                return False
        elif type(x) is not type(y) or x != y:
            return False
    return True
