"""Keys and values of past slots: per layer (k [B, K, H, S], v [B, K, S, H]), an argument and a result, never module state.

One array per layer, head-major: a stacked or slot-major cache is copied whole for every token on CPU (2.9 times slower).
Keys have the slots last: both products with one query then run along memory (decoding is 1.2 times faster on CPU).
Rows are right-aligned: row b occupies slots start[b] .. slot, and slot s holds its position s - start[b].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LayerCache = tuple[Float[Array, "B K H S"], Float[Array, "B K S H"]]
"""Keys, values."""
Cache = tuple[LayerCache, ...]


def allocate(k_BKTH: Array, v_BKTH: Array, capacity: int) -> LayerCache:
    """A layer's cache of `capacity` slots whose first T hold the given keys and values."""
    rest = [(0, 0), (0, 0), (0, capacity - k_BKTH.shape[2]), (0, 0)]
    return jnp.pad(k_BKTH, rest).swapaxes(2, 3), jnp.pad(v_BKTH, rest)


def write(layer: LayerCache, k_BKTH: Array, v_BKTH: Array, slot: Int[Array, ""]) -> LayerCache:
    """The layer's cache with slots slot .. slot + T - 1 replaced, in every row."""
    k_BKHS, v_BKSH = layer
    k_BKHS = jax.lax.dynamic_update_slice_in_dim(k_BKHS, k_BKTH.swapaxes(2, 3), slot, axis=3)
    return k_BKHS, jax.lax.dynamic_update_slice_in_dim(v_BKSH, v_BKTH, slot, axis=2)


def visible(start: Int[Array, " B"], slots: Int[Array, " T"], capacity: int, window: int | None) -> Bool[Array, "B T S"]:
    """What the queries at `slots` see: slots start[b] <= s <= their own, the last `window` of them."""
    s = jnp.arange(capacity)
    seen = (s >= start[:, None, None]) & (s <= slots[:, None])
    return seen if window is None else seen & (s > slots[:, None] - window)
