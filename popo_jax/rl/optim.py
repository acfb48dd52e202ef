"""The optimizer: AdamW behind a global-norm clip. The learning rate is applied by the train step, from its own counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from popo_jax.config import OptimConfig
from popo_jax.ops.rounding import round_tree
from popo_jax.rl.state import Params


def make_tx(c: OptimConfig) -> optax.GradientTransformation:
    """Gradient -> direction of AdamW in float32, not yet multiplied by the learning rate.

    Weight decay falls on matrices only (stacked blocks: 3 axes and more, or embeddings), not on biases and norm scales.
    """
    return kept_in(
        optax.chain(
            optax.clip_by_global_norm(c.grad_clip),
            optax.scale_by_adam(b1=c.b1, b2=c.b2, eps=c.eps),
            optax.add_decayed_weights(c.weight_decay, mask=_matrices),
        ),
        jnp.dtype(c.state_dtype),
    )


def kept_in(tx: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """`tx` computed in float32, whatever the parameters' dtype; its state is kept in `dtype` between steps.

    In bfloat16 it is rounded by chance: with b2 = 0.999 a second moment moves by a thousandth of itself, which rounding to the
    nearest would drop every time. `tx.update` then wants `key`, a random one for each update.
    """

    def init(params: Params) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype) if _is_float(x) else x, tx.init(wide(params)))

    def update(grads: Params, state: Any, params: Params, *, key: jax.Array) -> tuple[Params, Any]:
        direction, new = tx.update(wide(grads), wide(state), wide(params))
        return direction, round_tree(new, state, key)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def apply(
    tx: optax.GradientTransformation, grads: Params, opt_state: Any, params: Params, rate: Float[Array, ""], key: jax.Array
) -> tuple[Params, Any, Params]:
    """(parameters, optimizer state) after one step at learning rate `rate`, and what was added to the parameters, float32.

    Parameters and state in bfloat16 are rounded by chance, with `key`.
    """
    for_state, for_params = jax.random.split(key)
    direction, opt_state = tx.update(grads, opt_state, params, key=for_state)  # type: ignore[call-arg]
    moves = jax.tree.map(lambda d: -rate * d, direction)
    return round_tree(jax.tree.map(jnp.add, wide(params), moves), params, for_params), opt_state, moves


def wide(tree: Any) -> Any:
    """Floats in float32, integers as they are."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if _is_float(x) else x, tree)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


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
