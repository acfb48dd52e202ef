"""The train step: log-probs, decoupled surrogate, gradient, AdamW. Pure; `build` jits it, nothing here does.

Mini-batches are a scan over optimizer steps, micro-batches a scan inside that accumulates gradients. Both take rows in
strides, so a batch sharded over its rows stays sharded and a mini-batch holds whole groups (slots s with s mod M == m).
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
from popo_jax.rl.optim import learning_rate
from popo_jax.rl.state import Batch, Params, StepOut, TrainState


def train_step(
    state: TrainState, batch: Batch, *, model: Decoder, tx: optax.GradientTransformation, c: Config
) -> tuple[TrainState, StepOut]:
    """One step of POPO: M optimizer steps on a batch of fixed shape.

    The proximal policy is the parameters at entry, for fresh and replayed rows alike. With one mini-batch its log-probs
    come from the gradient's own forward pass; with several from one gradient-free pass first. A mini-batch without a
    counted token, or with a loss or gradient that is not finite, is not applied (`update/skipped`, `update/nonfinite`).
    """
    M = c.batch.mini_batches
    logp_prox = None if M == 1 else start_logprobs(state.params, batch, model=model, c=c)
    trained, frozen = lora.split(state.params, model.c)
    minis = jax.tree.map(lambda x: split_slots(x, M, c.batch.group_size), (batch, logp_prox))
    rate = learning_rate(c.optim, c.steps)(state.step)

    def mini_step(carry: tuple[Params, Any], mini: tuple[Batch, Any]) -> tuple[tuple[Params, Any], tuple[Any, Any]]:
        params, opt_state = carry
        grads, sums, logp = gradient(params, frozen, *mini, state.step, model=model, c=c)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])
        applied = finite & (sums["tokens"] > 0)
        updates, new_opt = tx.update(grads, opt_state, params)
        updates = jax.tree.map(lambda u, p: (-rate * u).astype(p.dtype), updates, params)
        new = (optax.apply_updates(params, updates), new_opt)
        carry = jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, carry)
        moved = jnp.where(applied, optax.global_norm(updates), 0.0)
        sums |= {"grad_norm": norm, "update_norm": moved, "skipped": sums["tokens"] == 0, "nonfinite": ~finite}
        return carry, (sums, logp)

    (params, opt_state), (sums, logp) = jax.lax.scan(mini_step, (trained, state.opt_state), minis)
    logp_start = join_slots(logp, c.batch.group_size) if logp_prox is None else logp_prox
    logp_start = jnp.where(batch.sampled_mask, logp_start, 0.0)
    metrics = measures.finish(sums) | {"learning_rate": rate}
    return TrainState(state.step + 1, lora.join(params, frozen), opt_state), StepOut(metrics, logp_start)


def gradient(
    params: Params, frozen: Params, mini: Batch, logp_prox: Float[Array, "b T"] | None, step: Array, *, model: Decoder, c: Config
) -> tuple[Params, dict[str, Array], Float[Array, "b T"]]:
    """Gradient of one mini-batch's loss in `params`, sums for the metrics, and log-probs [b, T]; `frozen`: the other weights."""
    limit = c.sample.max_response_tokens
    below = jnp.maximum(denominator(mini.token_mask, aggregation=c.loss.aggregation, response_limit=limit), 1.0)
    n = 1 if c.batch.micro_batch is None else mini.tokens.shape[0] // c.batch.micro_batch
    micros = jax.tree.map(lambda x: split_rows(x, n), (mini, logp_prox))

    def loss_of(params: Params, micro: Batch, prox: Float[Array, "r T"] | None) -> tuple[Array, tuple[dict[str, Array], Array]]:
        logp, entropy = model.logprobs(lora.join(params, frozen), micro.tokens, temperature=c.sample.temperature)
        prox = jax.lax.stop_gradient(logp) if prox is None else prox
        around = anchors(prox, micro, c=c)
        terms = objective_terms(logp, entropy, around, micro, c=c)
        loss = sum(sign * numerator(x, micro.token_mask, c.loss.aggregation) for sign, x in terms) / below
        sums = measures.sums(*jax.lax.stop_gradient((logp, entropy, prox, around)), micro, step, c=c)
        return loss, (sums | {"loss": loss}, logp)

    def one(total: tuple[Params, dict[str, Array]], micro: tuple[Batch, Any]) -> tuple[Any, Array]:
        (_, (sums, logp)), grads = jax.value_and_grad(loss_of, has_aux=True)(params, *micro)
        return (jax.tree.map(jnp.add, total[0], grads), measures.add(total[1], sums)), logp

    zeros = jax.tree.map(jnp.zeros_like, params)
    (grads, sums), logp = jax.lax.scan(one, (zeros, measures.zero()), micros)
    return grads, sums, join_rows(logp)


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


def start_logprobs(params: Params, batch: Batch, *, model: Decoder, c: Config) -> Float[Array, "B T"]:
    """Log-probs of every row under `params`, float32, without a gradient, a micro-batch at a time."""
    rows = batch.tokens.shape[0]
    n = 1 if c.batch.micro_batch is None else rows // c.batch.micro_batch
    return score(params, batch.tokens, model=model, temperature=c.sample.temperature, parts=n)


def score(params: Params, tokens: Array, *, model: Decoder, temperature: float, parts: int = 1) -> Float[Array, "B T"]:
    """Log-probs [B, T] of `tokens` under `params` at `temperature`, in `parts` equal parts one after another."""

    def one(_: None, part: Array) -> tuple[None, Array]:
        return None, model.logprobs(params, part, temperature=temperature)[0]

    return join_rows(jax.lax.scan(one, None, split_rows(tokens, parts))[1])


def split_slots(x: Array, M: int, G: int) -> Array:
    """[P*G, ...] -> [M, P/M*G, ...]: entry m holds the slots s with s mod M == m, in order."""
    slots = x.reshape(x.shape[0] // (M * G), M, G, *x.shape[1:])
    return slots.swapaxes(0, 1).reshape(M, -1, *x.shape[1:])


def join_slots(x: Array, G: int) -> Array:
    """Inverse of `split_slots`."""
    M, rows = x.shape[:2]
    return x.reshape(M, rows // G, G, *x.shape[2:]).swapaxes(0, 1).reshape(M * rows, *x.shape[2:])


def split_rows(x: Array, n: int) -> Array:
    """[b, ...] -> [n, b/n, ...]: part j holds the rows r with r mod n == j."""
    return x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)


def join_rows(x: Array) -> Array:
    """Inverse of `split_rows`."""
    return x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])
