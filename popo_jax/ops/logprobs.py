"""From logits to log-probs of tokens, and to the logits a sampler draws from. The one place where tokens are shifted:
logits at t - 1 speak of token t, everything that leaves here at t speaks of token t. V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_FLOOR = -1e30
"""Stands for a logit of -inf (a padded vocabulary): 0 x -1e30 is 0 in the entropy, 0 x -inf is NaN."""


def next_token_logprobs(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], *, temperature: float) -> Float[Array, "B T"]:
    """Log-prob of each token under the logits before it, nats, float32: log_softmax(logits[:, t-1] / temperature)[tokens[:, t]].

    0 at t = 0, which nothing speaks of. temperature > 0. Errors: ValueError for shapes that do not fit.
    """
    return logprobs_and_entropy(logits, tokens, temperature=temperature)[0]


def logprobs_and_entropy(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], *, temperature: float
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(log-prob of token t, entropy of the distribution it was drawn from), nats, float32; both 0 at t = 0.

    H = log sum exp z - sum softmax(z) z with z = logits / temperature: both from one pass over exp(z), with no log-softmax
    of [B, T, V] kept (with the gradient, a third of its memory in float32 on CPU). Errors: ValueError for shapes that do not fit.
    """
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(f"expected logits [B, T, V] and tokens [B, T], got {logits.shape} and {tokens.shape}")
    logp_BT, entropy_BT, _, _ = speak(logits[:, :-1], tokens[:, 1:], temperature)
    return aligned(logp_BT), aligned(entropy_BT)


def filtered_logits(
    logits: Float[Array, "B V"], *, temperature: float, top_k: int | None = None, top_p: float = 1.0
) -> Float[Array, "B V"]:
    """Logits of the sampling distribution, float32: temperature, then top-k, then top-p; -inf where filtered out.

    top_k: the k largest, and what ties with the k-th; None: off. top_p in (0, 1]: the smallest set of what is left whose
    mass reaches p, the lower index first among equals, never empty; 1: off (Holtzman et al., arXiv:1904.09751).
    """
    x_BV = _wide(logits) / temperature
    if top_k is not None and top_k < x_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(x_BV, top_k)[0][..., -1:]
        x_BV = jnp.where(x_BV >= kth_B1, x_BV, -jnp.inf)
    return x_BV if top_p >= 1 else jnp.where(_nucleus(x_BV, top_p), x_BV, -jnp.inf)


def speak(logits_BTV: Array, tokens_BT: Array, temperature: float) -> tuple[Array, Array, Array, Array]:
    """(log-probs, entropies, largest logits, log sum exp z), unshifted: position t of each is what logits t say."""
    top_BT = jax.lax.stop_gradient(_wide(jnp.max(logits_BTV, axis=-1)))
    z_BTV = scaled(logits_BTV, top_BT, temperature)
    e_BTV = jnp.exp(z_BTV)
    sum_BT = jnp.sum(e_BTV, axis=-1)
    chosen_BT = _wide(jnp.take_along_axis(logits_BTV, tokens_BT[..., None], axis=-1)[..., 0])
    logp_BT = (chosen_BT - top_BT) / temperature - jnp.log(sum_BT)
    return logp_BT, jnp.log(sum_BT) - jnp.sum(e_BTV * z_BTV, axis=-1) / sum_BT, top_BT, jnp.log(sum_BT)


def scaled(logits_BTV: Array, top_BT: Array, temperature: float) -> Array:
    """z = (logits - the largest) / temperature, float32."""
    return jnp.maximum((_wide(logits_BTV) - top_BT[..., None]) / temperature, _FLOOR)


def aligned(x_BT: Array) -> Array:
    """What the positions before the last say, moved to the tokens they speak of: 0 at t = 0."""
    return jnp.pad(x_BT, ((0, 0), (1, 0)))


def _nucleus(x_BV: Array, p: float) -> Array:
    """True for the smallest set whose mass reaches p."""
    sorted_BV = jnp.sort(x_BV, axis=-1, descending=True)
    mass_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(mass_BV, axis=-1) - mass_BV  # a token stays if those ahead of it do not reach p
    n_B1 = jnp.sum(before_BV < p, axis=-1, keepdims=True)
    last_B1 = jnp.take_along_axis(sorted_BV, n_B1 - 1, axis=-1)
    above_BV, ties_BV = x_BV > last_B1, x_BV == last_B1
    room_B1 = n_B1 - jnp.sum(above_BV, axis=-1, keepdims=True)
    return above_BV | (ties_BV & (jnp.cumsum(ties_BV, axis=-1) <= room_B1))


def _wide(x: Array) -> Array:
    """float32; float64 stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
