"""The optimizer: AdamW behind a global-norm clip. The learning rate is applied by the train step, from its own counter."""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax
from jaxtyping import Array, Float, Int

from popo_jax.config import OptimConfig


def make_tx(c: OptimConfig) -> optax.GradientTransformation:
    """Gradient -> direction of AdamW, not yet multiplied by the learning rate.

    Weight decay falls on matrices only (stacked blocks: 3 axes and more, or embeddings), not on biases and norm scales.
    """
    return optax.chain(
        optax.clip_by_global_norm(c.grad_clip),
        optax.scale_by_adam(b1=c.b1, b2=c.b2, eps=c.eps),
        optax.add_decayed_weights(c.weight_decay, mask=_matrices),
    )


def learning_rate(c: OptimConfig, steps: int) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    """Train step (from 0) -> learning rate: linear warm-up, then constant or down to 0 at `steps`."""
    after = max(steps - c.warmup_steps, 1)
    main = {
        "constant": optax.constant_schedule(c.learning_rate),
        "linear": optax.linear_schedule(c.learning_rate, 0.0, after),
        "cosine": optax.cosine_decay_schedule(c.learning_rate, after),
    }[c.schedule]
    rise = optax.linear_schedule(c.learning_rate / (c.warmup_steps + 1), c.learning_rate, c.warmup_steps)
    return optax.join_schedules([rise, main], [c.warmup_steps]) if c.warmup_steps else main


def _matrices(params: optax.Params) -> optax.Params:
    def is_matrix(path: jax.tree_util.KeyPath, _: jax.Array) -> bool:
        return str(getattr(path[-1], "key", "")) in ("kernel", "embedding")

    return jax.tree_util.tree_map_with_path(is_matrix, params)
