"""One token per row from its logits. A draw depends on its row and token only, never on which rows share the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from popo_jax.ops.logprobs import filtered_logits


def draw(
    logits: Float[Array, "B V"],
    key: jax.Array,
    row: Int[Array, " B"],
    t: Int[Array, ""],
    *,
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """(tokens, log-probs under the sampling distribution). Temperature 0 is greedy: a point mass, log-prob 0.

    Gumbel-max with the key of token t of row i: fold_in(fold_in(key, i), t).
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(logits.shape[0], jnp.float32)
    scaled_BV = filtered_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)

    def noise(i: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, i), t), logits.shape[1:], jnp.float32)

    token = jnp.argmax(scaled_BV + jax.vmap(noise)(row), axis=-1)
    logp = jnp.take_along_axis(scaled_BV, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(scaled_BV, axis=-1)
    return token.astype(jnp.int32), logp
