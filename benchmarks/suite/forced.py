"""Response lengths of choice from the sampler as it is: a decoder that decides how likely the end token is.

A row's end token is drawn with probability hazard[j] as its j-th token, whatever the weights say: its logit becomes
log(h / (1 - h)) above the log-sum-exp of all others. Prefill, decode, draws, chunks, compaction and waves are the
sampler's own, and lengths differ within a group as they do in training. What it adds is one log-sum-exp over the
vocabulary for each token (`draw` has another), in the case with equal lengths as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from popo_jax.models.decoder import DecodeParams, Decoder
from popo_jax.models.kv_cache import Cache
from popo_jax.scenes import Images

CERTAIN = 60.0
"""Log-odds that stand for a probability of 1."""


@dataclass(frozen=True)
class Forced(Decoder):
    """A Decoder for prompts of `prompt` tokens each and temperature 1, whose responses end by `hazard`."""

    end: int = 1
    prompt: int = 1
    hazard: tuple[float, ...] = (1.0,)
    """Probability that the j-th token is the end token, given that none before was; 1 at the response limit."""

    def prefill(
        self,
        decode_params: DecodeParams,
        tokens: Int[Array, "B S"],
        start: Int[Array, " B"],
        capacity: int,
        images: Images | None = None,
    ) -> tuple[Float[Array, "B V"], Cache]:
        logits, cache = super().prefill(decode_params, tokens, start, capacity, images)
        return self._ending(logits, jnp.zeros_like(start)), cache

    def decode(
        self,
        decode_params: DecodeParams,
        cache: Cache,
        token: Int[Array, " B"],
        slot: Int[Array, ""],
        start: Int[Array, " B"],
        shift: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B V"], Cache]:
        logits, cache = super().decode(decode_params, cache, token, slot, start, shift)
        return self._ending(logits, slot - start - self.prompt + 1), cache

    def _ending(self, logits_BV: Array, j_B: Array) -> Any:
        others_B = jax.nn.logsumexp(logits_BV.at[:, self.end].set(-jnp.inf), axis=-1)
        h = np.clip(self.hazard, 1e-30, 1 - 1e-7)
        odds = jnp.asarray(np.where(np.array(self.hazard) >= 1, CERTAIN, np.log(h / (1 - h))), jnp.float32)
        return logits_BV.at[:, self.end].set(others_B + odds[j_B])


def uniform(shortest: int, longest: int) -> tuple[float, ...]:
    """Hazard of lengths drawn uniformly from shortest .. longest: 1 / (how many lengths are left)."""
    return tuple(0.0 if j + 1 < shortest else 1.0 / (longest - j) for j in range(longest))


def equal(length: int, limit: int) -> tuple[float, ...]:
    """Hazard of responses of exactly `length` tokens."""
    return tuple(float(j + 1 >= length) for j in range(limit))
