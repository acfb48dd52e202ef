"""The decoupled surrogate, its ratios and weights, the KL to a reference, and how per-token values become one number.

B rows, T positions; position t speaks of token t. Masked log-probs are zeroed on entry, before any exp: masking only
at the end gives the right value and a NaN gradient.
"""

from __future__ import annotations

import difflib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from popo_jax.ops.masked import counted, masked_mean, masked_sum, zeroed
from popo_jax.types import UserError

LOG_LIMIT = 20.0
"""Log ratios are clipped to +-20: e^20 = 4.9e8 times any advantage is far from float32's largest."""

AGGREGATIONS = ("token", "sequence", "dr_grpo")


def decoupled_surrogate(
    logp: Float[Array, "B T"],
    logp_prox: Float[Array, "B T"],
    logp_behav: Float[Array, "B T"],
    advantages: Float[Array, " B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip_low: float,
    clip_high: float,
    weight_cap: float,
    dual_clip: float | None = None,
) -> Float[Array, "B T"]:
    """Per-token objective J [B, T], to be maximized; 0 where mask is False.

        w = min(pi_prox / pi_behav, weight_cap)
        r = pi_theta / pi_prox
        J = w * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
        with dual clip, for A < 0:  J = w * max(min(..), dual_clip * A)

    Decoupled PPO (Hilton et al. 2021, arXiv:2110.00641) with DAPO's two-sided clip (arXiv:2503.14476) and dual clip (Ye et
    al. 2020, arXiv:1912.09729). `logp` current, `logp_prox` at the start of the step, `logp_behav` of the policy that
    sampled: nats under the sampling distribution, of one shape; gradients reach `logp` alone of the three. Advantages:
    one per row or one per token. Computed in float32 whatever comes in. Errors: ValueError for shapes that do not fit.
    """
    r_BT = ratios(logp, logp_prox, mask)
    w_BT = weights(logp_prox, logp_behav, mask, cap=weight_cap)
    A_BT = _per_token(advantages, mask)
    J_BT = jnp.minimum(r_BT * A_BT, jnp.clip(r_BT, 1 - clip_low, 1 + clip_high) * A_BT)
    if dual_clip is not None:
        J_BT = jnp.where(A_BT < 0, jnp.maximum(J_BT, dual_clip * A_BT), J_BT)
    return w_BT * J_BT


def ratios(logp: Float[Array, "B T"], logp_prox: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """r = exp(clip(logp - logp_prox, -20, 20)), 1 where masked; no gradient to logp_prox."""
    return jnp.exp(_log_ratio(mask, logp=logp, logp_prox=jax.lax.stop_gradient(logp_prox)))


def log_weights(logp_prox: Float[Array, "B T"], logp_behav: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """clip(logp_prox - logp_behav, -20, 20), 0 where masked; a constant, no gradient."""
    return jax.lax.stop_gradient(_log_ratio(mask, logp_prox=logp_prox, logp_behav=logp_behav))


def weights(
    logp_prox: Float[Array, "B T"], logp_behav: Float[Array, "B T"], mask: Bool[Array, "B T"], *, cap: float | None = None
) -> Float[Array, "B T"]:
    """Importance weights min(exp(log_weights), cap), 1 where masked (or the cap, if below 1); a constant. cap None: none."""
    w_BT = jnp.exp(log_weights(logp_prox, logp_behav, mask))
    return w_BT if cap is None else jnp.minimum(w_BT, cap)


def sequence_behaviour(
    logp_prox: Float[Array, "B T"], logp_behav: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """A logp_behav that makes every counted token of a row carry the weight of its whole response; 0 where masked.

        logp_prox[b, t] - out[b, t] = clip(sum over counted s of (logp_prox - logp_behav)[b, s], -20, 20)

    Rows where the two policies agree come back as logp_prox to the bit, so their weight stays exactly 1. No gradient.
    """
    prox_BT, behav_BT = jax.lax.stop_gradient(_entered(mask, logp_prox=logp_prox, logp_behav=logp_behav))
    total_B1 = jnp.sum(prox_BT - behav_BT, axis=1, keepdims=True)
    return jnp.where(mask, prox_BT - jnp.clip(total_B1, -LOG_LIMIT, LOG_LIMIT), 0.0)


def k3(logp: Float[Array, "B T"], logp_ref: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Estimate of KL(pi_theta || pi_ref) in nats: exp(d) - 1 - d, d = clip(logp_ref - logp, -20, 20); 0 where masked.

    Schulman, "Approximating KL divergence" (2020), his k3: never negative. No gradient to logp_ref.
    """
    d_BT = _log_ratio(mask, logp_ref=jax.lax.stop_gradient(logp_ref), logp=logp)
    return jnp.expm1(d_BT) - d_BT


def numerator(values: Float[Array, "B T"], mask: Bool[Array, "B T"], aggregation: str) -> Float[Array, ""]:
    """The part of an aggregate that adds over micro-batches.

    token, dr_grpo: sum over counted tokens. sequence: sum over rows of the row's mean over its counted tokens.
    Errors: UserError for an unknown aggregation.
    """
    if _known(aggregation) == "sequence":
        return jnp.sum(masked_mean(values, mask, axis=1))
    return masked_sum(values, mask)


def denominator(mask: Bool[Array, "B T"], *, aggregation: str, response_limit: int | None = None) -> Float[Array, ""]:
    """What the sum of numerators is divided by; `mask` is that of the whole mini-batch, over micro-batches and devices.

    token: counted tokens. sequence: rows with a counted token. Both 0 if nothing is counted: the caller guards.
    dr_grpo: all rows x response_limit, whatever is counted (Dr. GRPO, arXiv:2503.20783).
    Errors: UserError for an unknown aggregation, or dr_grpo without a limit.
    """
    if _known(aggregation) == "token":
        return counted(mask)
    if aggregation == "sequence":
        return counted(jnp.any(mask, axis=1))
    if response_limit is None:
        raise UserError("aggregation dr_grpo divides by rows x response_limit: expected response_limit, got None")
    return jnp.float32(mask.shape[0] * response_limit)


def aggregate(
    values: Float[Array, "B T"], mask: Bool[Array, "B T"], *, aggregation: str, response_limit: int | None = None
) -> Float[Array, ""]:
    """numerator / denominator of one batch; 0 where nothing is counted. Errors as `denominator`."""
    below = denominator(mask, aggregation=aggregation, response_limit=response_limit)
    return numerator(values, mask, aggregation) / jnp.maximum(below, 1.0)


def _log_ratio(mask: Array, **pair: Array) -> Array:
    above_BT, below_BT = _entered(mask, **pair)
    return jnp.clip(above_BT - below_BT, -LOG_LIMIT, LOG_LIMIT)


def _entered(mask: Array, **arrays: Array) -> list[Array]:
    """Every array in float32, zeroed where masked. Errors: ValueError with all shapes if they are not one [B, T]."""
    shapes = {name: jnp.shape(x) for name, x in arrays.items()} | {"mask": jnp.shape(mask)}
    if len(set(shapes.values())) > 1 or len(shapes["mask"]) != 2:
        raise ValueError(f"expected one shape [B, T], got {', '.join(f'{k} {v}' for k, v in shapes.items())}")
    return [zeroed(x, mask) for x in arrays.values()]


def _per_token(advantages: Array, mask: Array) -> Array:
    A, (B, T) = jnp.asarray(advantages), jnp.shape(mask)
    if A.shape not in ((B,), (B, T)):
        raise ValueError(f"expected advantages [B] or [B, T], got advantages {A.shape}, mask {(B, T)}")
    return zeroed(jnp.broadcast_to(A[:, None] if A.ndim == 1 else A, (B, T)), mask)


def _known(aggregation: str) -> str:
    if aggregation not in AGGREGATIONS:
        near = difflib.get_close_matches(str(aggregation), AGGREGATIONS, n=1, cutoff=0.0)[0]
        raise UserError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r} (did you mean {near}?)")
    return aggregation
