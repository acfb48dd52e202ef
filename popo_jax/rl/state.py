"""What a train step takes and gives: Batch, TrainState, StepOut; and where random keys come from."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from popo_jax import scenes
from popo_jax.config import Config
from popo_jax.model_config import ModelConfig
from popo_jax.scenes import Images, Sizes
from popo_jax.sharding import BATCH
from popo_jax.task_config import PICTURED

Params = Any


class Batch(NamedTuple):
    """B = P * G rows, row s * G + g is response g of slot s, but for changes of place within a mini-batch (data/arrange.py);
    prompt, response, padding, from column 0.

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
    bucket: Int[Array, "M n"] | None = None
    """Which of `Config.lengths` each micro-batch is computed up to, -1: not at all (data/arrange.py). None: all of it."""
    images: Images | None = None
    """What each row sees, for a policy that does."""


def batch_specs() -> Any:
    """A Batch that says how each field lies on the mesh."""
    return Batch(**dict.fromkeys(Batch._fields, BATCH) | {"bucket": PartitionSpec()})  # type: ignore[arg-type]


def abstract_batch(c: Config, model: ModelConfig) -> Batch:
    """Shapes and dtypes of a run's batches, to compile for without making one."""
    f32, i32, flag = jnp.float32, jnp.int32, jnp.bool_
    kinds: dict[str, Any] = {"tokens": i32, "sampled_mask": flag, "token_mask": flag, "logp_behav": f32, "logp_sampler": f32}
    kinds |= {"logp_ref": f32} if c.loss.kl_coef else {}
    per_token: dict[str, Any] = {k: jax.ShapeDtypeStruct((c.rows, c.row_tokens), v) for k, v in kinds.items()}
    per_row: dict[str, Any] = {
        k: jax.ShapeDtypeStruct((c.rows,), v) for k, v in {"adv": f32, "fresh": flag, "version": i32}.items()
    }
    bucket: Any = jax.ShapeDtypeStruct((c.batch.mini_batches, c.micro_batches), i32)
    images, sizes = None, sizes_of(c, model)
    if sizes is not None:
        images = Images(*(jax.ShapeDtypeStruct(*f) for f in scenes.abstract(c.rows, sizes, c.row_tokens, model.vision)))
    return Batch(**per_token, **per_row, bucket=bucket, images=images)


def sizes_of(c: Config, model: ModelConfig) -> Sizes | None:
    """The most that a row shows, `images.max_windows` and `images.max_tokens`; None: the policy reads text alone, or is asked
    in text alone."""
    i, pictured = c.images, any(t.name in PICTURED for t in c.tasks)
    return Sizes(i.max_windows, i.max_tokens) if model.sees and pictured and i.max_windows and i.max_tokens else None


class TrainState(NamedTuple):
    step: Any
    """int32 []: train steps applied, the parameters' version. (Leaves may be ShapeDtypeStructs: plan and restore.)"""
    params: Params
    opt_state: Any


class StepOut(NamedTuple):
    metrics: dict[str, Float[Array, ""]]
    """NaN where there is nothing to speak of (no replayed row, say)."""
    logp_start: Float[Array, "B T"]
    """Float32, under the parameters at entry, temperature applied; 0 where not counted."""


class Purpose(enum.IntEnum):
    """What a key is for. Numbers are part of a run's identity: add, never renumber."""

    INIT = 0
    SAMPLE = 1
    EVAL = 2
    WARM_START = 3
    ROUND = 4
    """Rounding to bfloat16; of seed 0 in every run, so that the seed is no part of the compiled step."""


def key_for(seed: int, purpose: Purpose, step: Any, *more: int) -> jax.Array:
    """fold_in(fold_in(root, purpose), step), then one fold for each of `more` (dapo's round, a task's index)."""
    key = jax.random.fold_in(jax.random.key(seed), int(purpose))
    for number in (step, *more):
        key = jax.random.fold_in(key, number)
    return key
