"""The train step: log-probs, decoupled surrogate, gradient, AdamW. Pure; `build` jits it, nothing here does.

Mini-batches are a scan over optimizer steps, micro-batches a loop inside that accumulates gradients (`rl/micro.py`). A mini-batch
holds whole groups: slots s with s mod M == m.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from popo_jax.config import Config
from popo_jax.models import lora
from popo_jax.models.decoder import Decoder
from popo_jax.ops.losses import decoupled_surrogate, denominator, k3, numerator, sequence_behaviour
from popo_jax.rl import measures
from popo_jax.rl.micro import join_rows, join_slots, over_micro_batches, split_rows, split_slots
from popo_jax.rl.optim import apply, learning_rate, wide
from popo_jax.rl.state import Batch, Params, Purpose, StepOut, TrainState, key_for
from popo_jax.scenes import Images


def train_step(
    state: TrainState, batch: Batch, *, model: Decoder, tx: optax.GradientTransformation, c: Config
) -> tuple[TrainState, StepOut]:
    """One step of POPO: M optimizer steps on a batch of fixed shape.

    The proximal policy is the parameters at entry, for fresh and replayed rows alike. With one mini-batch its log-probs
    come from the gradient's own forward pass; with several from one gradient-free pass first. A mini-batch without a
    counted token, or with a loss or gradient that is not finite, is not applied (`update/skipped`, `update/nonfinite`).
    """
    M, G = c.batch.mini_batches, c.batch.group_size
    trained, frozen = lora.split(state.params, model.c)
    rows = jax.tree.map(lambda x: split_slots(x, M, G), batch._replace(bucket=None))
    minis = rows._replace(bucket=batch.bucket)
    logp_prox = None if M == 1 else start_logprobs(state.params, minis, model=model, c=c)
    rate, keys = learning_rate(c.optim, c.steps)(state.step), jax.random.split(key_for(0, Purpose.ROUND, state.step), M)

    def mini_step(carry: tuple[Params, Any], mini: tuple[Batch, Any, jax.Array]) -> tuple[tuple[Params, Any], tuple[Any, Any]]:
        (params, opt_state), (rows, prox, key) = carry, mini
        grads, sums, logp = gradient(params, frozen, rows, prox, state.step, model=model, c=c)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])
        applied = finite & (sums["tokens"] > 0)
        *new, moves = apply(tx, grads, opt_state, params, rate, key)
        carry = jax.tree.map(lambda n, o: jnp.where(applied, n, o), tuple(new), carry)
        moved = jnp.where(applied, optax.global_norm(moves), 0.0)
        sums |= {"grad_norm": norm, "update_norm": moved, "skipped": sums["tokens"] == 0, "nonfinite": ~finite}
        return carry, (sums, logp)

    (params, opt_state), (sums, logp) = jax.lax.scan(mini_step, (trained, state.opt_state), (minis, logp_prox, keys))
    logp_start = join_slots(logp if logp_prox is None else logp_prox, G)
    logp_start = jnp.where(batch.token_mask, logp_start, 0.0)
    metrics = measures.finish(sums) | {"learning_rate": rate}
    return TrainState(state.step + 1, lora.join(params, frozen), opt_state), StepOut(metrics, logp_start)


def gradient(
    params: Params, frozen: Params, mini: Batch, logp_prox: Float[Array, "b T"] | None, step: Array, *, model: Decoder, c: Config
) -> tuple[Params, dict[str, Array], Float[Array, "b T"]]:
    """Gradient of one mini-batch's loss in `params`, float32; sums for the metrics; log-probs [b, T]. `frozen`: other weights."""
    limit = c.sample.max_response_tokens
    below = jnp.maximum(denominator(mini.token_mask, aggregation=c.loss.aggregation, response_limit=limit), 1.0)

    def loss_of(params: Params, micro: Batch, prox: Float[Array, "r t"] | None) -> tuple[Array, tuple[dict[str, Array], Array]]:
        weights, temperature = lora.join(params, frozen), c.sample.temperature
        logp, entropy = model.logprobs(weights, micro.tokens, temperature=temperature, images=micro.images)
        prox = jax.lax.stop_gradient(logp) if prox is None else prox
        around = anchors(prox, micro, c=c)
        terms = objective_terms(logp, entropy, around, micro, c=c)
        loss = sum(sign * numerator(x, micro.token_mask, c.loss.aggregation) for sign, x in terms) / below
        sums = measures.sums(*jax.lax.stop_gradient((logp, entropy, prox, around)), micro, step, c=c)
        return loss, (sums | {"loss": loss}, logp)

    def one(micro: tuple[Batch, Any]) -> tuple[tuple[Params, dict[str, Array]], Array]:
        (_, (sums, logp)), grads = jax.value_and_grad(loss_of, has_aux=True)(params, *micro)
        return (wide(grads), sums), logp

    def add(total: tuple[Params, dict[str, Array]], new: tuple[Params, dict[str, Array]]) -> tuple[Params, dict[str, Array]]:
        return jax.tree.map(jnp.add, total[0], new[0]), measures.add(total[1], new[1])

    zero = jax.tree.map(jnp.zeros_like, wide(params)), measures.zero()
    rows = mini._replace(bucket=None), logp_prox
    (grads, sums), logp = over_micro_batches(one, zero, add, rows, mini.bucket, c=c)
    return grads, sums, logp


def objective_terms(
    logp: Array, entropy: Array, around: tuple[Array, Array], batch: Batch, *, c: Config
) -> list[tuple[float, Float[Array, "b T"]]]:
    """(factor, per-token term) whose sum, aggregated, is the loss: surrogate, KL to the reference, entropy bonus."""
    centre, behav = around
    J = decoupled_surrogate(
        logp,
        centre,
        behav,
        batch.adv,
        batch.token_mask,
        clip_low=c.loss.clip_low,
        clip_high=c.loss.clip_high,
        weight_cap=c.weight.cap,
        dual_clip=c.loss.dual_clip,
    )
    terms = [(-1.0, J)]
    if c.loss.kl_coef and batch.logp_ref is not None:
        terms.append((c.loss.kl_coef, k3(logp, batch.logp_ref, batch.token_mask)))
    if c.loss.entropy_coef:
        terms.append((-c.loss.entropy_coef, entropy))
    return terms


def anchors(prox: Array, batch: Batch, *, c: Config) -> tuple[Float[Array, "b T"], Float[Array, "b T"]]:
    """(centre of the trust region, behaviour log-probs the weight is taken against), both [b, T].

    Fresh rows pass logp_behav = logp_prox, so w = 1. popo-behav clips around the behaviour policy with w = 1.
    """
    behav = jnp.where(batch.fresh[:, None], prox, batch.logp_behav)
    if c.algorithm.preset.around == "behaviour":
        return behav, behav
    if c.weight.correct_sampler:
        behav = batch.logp_sampler
    if c.weight.level == "sequence":
        behav = sequence_behaviour(prox, behav, batch.token_mask)
    return prox, behav


def start_logprobs(params: Params, minis: Batch, *, model: Decoder, c: Config) -> Float[Array, "M b T"]:
    """Log-probs of every row that counts under `params`, float32, without a gradient, a micro-batch at a time."""

    def one(rows: tuple[Array, Images | None]) -> tuple[None, Array]:
        return None, model.logprobs(params, rows[0], temperature=c.sample.temperature, images=rows[1])[0]

    def mini(_: None, mini: Batch) -> tuple[None, Array]:
        return over_micro_batches(one, None, lambda *_: None, (mini.tokens, mini.images), mini.bucket, c=c)

    return jax.lax.scan(mini, None, minis)[1]


def score(
    params: Params, tokens: Array, images: Images | None = None, *, model: Decoder, temperature: float, parts: int = 1
) -> Float[Array, "B T"]:
    """Log-probs [B, T] of `tokens` under `params` at `temperature`, in `parts` equal parts one after another."""

    def one(_: None, part: tuple[Array, Images | None]) -> tuple[None, Array]:
        return None, model.logprobs(params, part[0], temperature=temperature, images=part[1])[0]

    rows = jax.tree.map(lambda x: split_rows(x, parts), (tokens, images))
    return join_rows(jax.lax.scan(one, None, rows)[1])
