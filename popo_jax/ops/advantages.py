"""Group-relative advantages: how much better a response is than its group. P prompts, G responses to each."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popo_jax.types import EPSILON, UserError

DEVIATION_EPSILON = 1e-6
"""Added to a group's standard deviation, as in TRL and verl up to its size."""


def group_advantages(rewards: Any, *, kind: str) -> Any:
    """[P, G] rewards -> [P, G] float32 advantages, numpy for numpy, jax for jax.

        grpo     (r - mean) / (std + 1e-6), std with ddof 1    DeepSeekMath, arXiv:2402.03300
        dr_grpo  r - mean                                      Dr. GRPO, arXiv:2503.20783
        rloo     (r - mean) G / (G - 1)                        = r - mean of the others, arXiv:2402.14740

    Exactly 0 in a group whose rewards lie within 1e-6 of each other, and in a group with a reward that is not finite;
    neither gives a NaN gradient. Every group sums to 0 up to rounding. numpy is computed in float64, jax in float32.
    Errors: UserError for an unknown kind or G < 2, ValueError for another shape.
    """
    xp: ModuleType = jnp if isinstance(rewards, jax.Array) else np
    r_PG = xp.asarray(rewards, dtype=jnp.float32 if xp is jnp else np.float64)
    centre = _known(kind)
    if r_PG.ndim != 2:
        raise ValueError(f"group_advantages: expected rewards [P, G], got {r_PG.shape}")
    if r_PG.shape[1] < 2:
        raise UserError(f"group_advantages: {kind} compares the responses of a group: expected G of at least 2, got {r_PG.shape}")
    r_PG = xp.where(xp.isfinite(r_PG).all(axis=1, keepdims=True), r_PG, 0.0)
    live_P1 = xp.max(r_PG, axis=1, keepdims=True) - xp.min(r_PG, axis=1, keepdims=True) > EPSILON
    d_PG = r_PG - xp.mean(r_PG, axis=1, keepdims=True)
    return xp.where(live_P1, centre(xp, d_PG, live_P1), 0.0).astype(np.float32)


def _grpo(xp: ModuleType, d_PG: Any, live_P1: Any) -> Any:
    variance_P1 = xp.sum(d_PG * d_PG, axis=1, keepdims=True) / (d_PG.shape[1] - 1)
    std_P1 = xp.sqrt(xp.where(live_P1, variance_P1, 1.0))  # the gradient of sqrt at 0 is not finite
    return d_PG / (std_P1 + DEVIATION_EPSILON)


def _dr_grpo(xp: ModuleType, d_PG: Any, live_P1: Any) -> Any:
    return d_PG


def _rloo(xp: ModuleType, d_PG: Any, live_P1: Any) -> Any:
    return d_PG * (d_PG.shape[1] / (d_PG.shape[1] - 1))


KINDS: dict[str, Callable[[ModuleType, Any, Any], Any]] = {"grpo": _grpo, "dr_grpo": _dr_grpo, "rloo": _rloo}
"""(numpy or jax.numpy, rewards less their group's mean, groups that differ) -> advantages of those groups."""


def _known(kind: str) -> Callable[[ModuleType, Any, Any], Any]:
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1, cutoff=0.0)[0]
        raise UserError(f"advantages must be one of {', '.join(KINDS)}, got {kind!r} (did you mean {near}?)")
    return KINDS[kind]
