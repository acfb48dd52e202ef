"""Keys and values of past slots: per layer (k, v), each [B, K, S, H], an argument and a result, never module state.

One array per layer, head-major: a stacked or slot-major cache is copied whole for every token on CPU (2.9 times slower).
Rows are right-aligned: row b occupies slots start[b] .. slot, and slot s holds its position s - start[b].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LayerCache = tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]
Cache = tuple[LayerCache, ...]


def allocate(k_BKTH: Array, v_BKTH: Array, capacity: int) -> LayerCache:
    """A layer's cache of `capacity` slots whose first T hold the given keys and values."""
    rest = [(0, 0), (0, 0), (0, capacity - k_BKTH.shape[2]), (0, 0)]
    return jnp.pad(k_BKTH, rest), jnp.pad(v_BKTH, rest)


def write(layer: LayerCache, k_BKTH: Array, v_BKTH: Array, slot: Int[Array, ""]) -> LayerCache:
    """The layer's cache with slots slot .. slot + T - 1 replaced, in every row."""
    k, v = (jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=2) for old, new in zip(layer, (k_BKTH, v_BKTH), strict=True))
    return k, v


def visible(start: Int[Array, " B"], slots: Int[Array, " T"], capacity: int) -> Bool[Array, "B T S"]:
    """What the queries at `slots` see: slots start[b] <= s <= their own."""
    s = jnp.arange(capacity)
    return (s >= start[:, None, None]) & (s <= slots[:, None])
