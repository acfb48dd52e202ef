"""What a train step takes and gives: Batch, TrainState, StepOut; and where random keys come from."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int

Params = Any


class Batch(NamedTuple):
    """B = P * G rows, row s * G + g is response g of slot s; prompt, response, padding, from column 0.

    Position t of a per-token array speaks of token t.
    """

    tokens: Int[Array, "B T"]
    sampled_mask: Bool[Array, "B T"]
    """The model chose this token."""
    token_mask: Bool[Array, "B T"]
    """Counted in the loss: sampled, and the row kept."""
    logp_behav: Float[Array, "B T"]
    """Stored log-probs of replayed rows; not read on fresh rows."""
    logp_sampler: Float[Array, "B T"]
    adv: Float[Array, " B"]
    fresh: Bool[Array, " B"]
    version: Int[Array, " B"]
    logp_ref: Float[Array, "B T"] | None = None


class TrainState(NamedTuple):
    step: Any
    """int32 []: train steps applied, the parameters' version. (Leaves may be ShapeDtypeStructs: plan and restore.)"""
    params: Params
    opt_state: Any


class StepOut(NamedTuple):
    metrics: dict[str, Float[Array, ""]]
    """NaN where there is nothing to speak of (no replayed row, say)."""
    logp_start: Float[Array, "B T"]
    """Float32, under the parameters at entry, temperature applied; 0 where not sampled."""


class Purpose(enum.IntEnum):
    """What a key is for. Numbers are part of a run's identity: add, never renumber."""

    INIT = 0
    SAMPLE = 1
    EVAL = 2
    WARM_START = 3


def key_for(seed: int, purpose: Purpose, step: int, *more: int) -> jax.Array:
    """fold_in(fold_in(root, purpose), step), then one fold for each of `more` (dapo's round, a task's index)."""
    key = jax.random.fold_in(jax.random.key(seed), int(purpose))
    for number in (step, *more):
        key = jax.random.fold_in(key, number)
    return key
