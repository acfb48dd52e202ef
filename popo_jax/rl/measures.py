"""What a train step reports, as sums over micro-batches that are divided once at the end; fresh and replayed apart."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from popo_jax.config import Config
from popo_jax.ops.losses import k3, ratios, weights
from popo_jax.rl.state import Batch

_RATIOS = {
    "entropy": ("entropy", "tokens"),
    "clip/low_fresh": ("low_fresh", "n_fresh"),
    "clip/high_fresh": ("high_fresh", "n_fresh"),
    "clip/low_replayed": ("low_replayed", "n_replayed"),
    "clip/high_replayed": ("high_replayed", "n_replayed"),
    "kl/proximal": ("kl_proximal", "n_fresh"),
    "kl/behaviour_replayed": ("kl_behaviour", "n_replayed"),
    "weight/mean": ("weight", "n_replayed"),
    "weight/capped": ("capped", "n_replayed"),
    "mismatch/mean": ("mismatch", "n_own"),
}
"""Metric -> (sum, count)."""
_MAXIMA = {"weight/max": ("weight_max", "n_replayed"), "mismatch/max": ("mismatch_max", "n_own")}
_SUMS = ("w", "w2", *{name for pair in _RATIOS.values() for name in pair})
_TOPS = tuple(name for name, _ in _MAXIMA.values())


def zero() -> dict[str, Array]:
    """What sums and maxima start from."""
    return {name: jnp.zeros(()) for name in (*_SUMS, *_TOPS, "loss")}


def sums(
    logp: Array, entropy: Array, prox: Array, anchors: tuple[Array, Array], batch: Batch, step: Array, *, c: Config
) -> dict[str, Array]:
    """Scalars of one micro-batch; per-token inputs [b, T], gradient-free; anchors as the loss took them.

    Replayed rows are those not marked fresh; `own` rows were sampled by the parameters at the start of this step.
    """
    centre, behav = anchors
    mask, fresh = batch.token_mask, batch.fresh[:, None]
    is_fresh, is_replayed = mask & fresh, mask & ~fresh
    own = mask & (batch.version == step)[:, None]
    ratio = ratios(logp, centre, mask)
    w = jnp.where(is_replayed, weights(centre, behav, is_replayed), 0.0)
    low = (batch.adv[:, None] < 0) & (ratio < 1 - c.loss.clip_low)
    high = (batch.adv[:, None] > 0) & (ratio > 1 + c.loss.clip_high)
    gap = jnp.where(own, jnp.abs(batch.logp_sampler - prox), 0.0)

    def total(x: Array | float, where: Array) -> Float[Array, ""]:
        return jnp.sum(jnp.where(where, x, 0.0), dtype=jnp.float32)

    counts = {"tokens": mask, "n_fresh": is_fresh, "n_replayed": is_replayed, "n_own": own}
    return {name: total(1.0, where) for name, where in counts.items()} | {
        "entropy": total(entropy, mask),
        "low_fresh": total(low, is_fresh),
        "high_fresh": total(high, is_fresh),
        "low_replayed": total(low, is_replayed),
        "high_replayed": total(high, is_replayed),
        "kl_proximal": jnp.sum(k3(logp, prox, is_fresh)),
        "kl_behaviour": jnp.sum(k3(batch.logp_behav, logp, is_replayed)),
        "weight": total(jnp.minimum(w, c.weight.cap), is_replayed),
        "capped": total(w > c.weight.cap, is_replayed),
        "w": total(w, is_replayed),
        "w2": total(w * w, is_replayed),
        "mismatch": jnp.sum(gap),
        "weight_max": jnp.max(w),
        "mismatch_max": jnp.max(gap),
    }


def add(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
    """Sums add, maxima keep the larger."""
    return {k: jnp.maximum(a[k], b[k]) if k in _TOPS else a[k] + b[k] for k in a}


def finish(s: dict[str, Array]) -> dict[str, Array]:
    """Metrics from the sums of all mini-batches, each [M]: token-weighted means, maxima, counts. NaN where n is 0."""
    tokens = s["tokens"]

    def over(a: Array, n: Array) -> Float[Array, ""]:
        return jnp.where(n > 0, a / jnp.maximum(n, 1e-30), jnp.nan)

    out = {k: over(jnp.sum(s[a]), jnp.sum(s[n])) for k, (a, n) in _RATIOS.items()}
    out |= {k: jnp.where(jnp.sum(s[n]) > 0, jnp.max(s[a]), jnp.nan) for k, (a, n) in _MAXIMA.items()}
    out |= {k: over(jnp.sum(s[k] * tokens), jnp.sum(tokens)) for k in ("loss", "grad_norm", "update_norm")}
    out["weight/ess"] = over(jnp.sum(s["w"]) ** 2, jnp.sum(s["n_replayed"]) * jnp.sum(s["w2"]))
    out |= {f"update/{k}": jnp.sum(s[k]).astype(jnp.float32) for k in ("skipped", "nonfinite", "tokens")}
    return out
