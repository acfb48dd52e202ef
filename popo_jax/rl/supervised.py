"""The warm start's step: cross-entropy on the teacher's answers. Pure, like the train step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from popo_jax.models.decoder import Decoder
from popo_jax.ops.masked import masked_mean
from popo_jax.rl.optim import apply
from popo_jax.rl.state import Params, Purpose, TrainState, key_for
from popo_jax.scenes import Images


def supervised_step(
    state: TrainState,
    tokens: Int[Array, "B T"],
    answer_mask: Bool[Array, "B T"],
    rate: Float[Array, ""],
    images: Images | None = None,
    *,
    model: Decoder,
    tx: optax.GradientTransformation,
) -> tuple[TrainState, Float[Array, ""]]:
    """One AdamW step at learning rate `rate` on the mean negative log-prob of the answers' tokens; returns that mean."""

    def loss_of(params: Params) -> Float[Array, ""]:
        return -masked_mean(model.logprobs(params, tokens, temperature=1.0, images=images)[0], answer_mask)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    params, opt_state, _ = apply(tx, grads, state.opt_state, state.params, rate, key_for(0, Purpose.ROUND, state.step))
    return TrainState(state.step + 1, params, opt_state), jnp.asarray(loss, jnp.float32)
