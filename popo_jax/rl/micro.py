"""A mini-batch in micro-batches: which rows, how many tokens of them, and the sum over those that have anything to count.

Rows are taken in strides, so that a batch sharded over its rows stays sharded. How many micro-batches are computed, and up to
which of the run's few lengths, is data (`Batch.bucket`, see data/arrange.py): one program, whatever the lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from popo_jax.config import Config
from popo_jax.scenes import Images


def over_micro_batches(
    one: Callable[[Any], tuple[Any, Float[Array, "r t"]]],
    zero: Any,
    add: Callable[[Any, Any], Any],
    rows: Any,
    bucket: Int[Array, " n"] | None,
    *,
    c: Config,
) -> tuple[Any, Float[Array, "b T"]]:
    """(sum of the first results of `one`, the second laid together) over the micro-batches of `rows`.

    `rows` is a tree of arrays [b, T] and [b]; `one` gets them as [r, t] and [r], t one of `c.lengths`. Rows of micro-batches that
    are not computed, and tokens beyond t, have 0. bucket None: all are computed, whole. A single micro-batch always is.
    """
    n, T = c.micro_batches, c.row_tokens
    micros = jax.tree.map(lambda x: split_rows(x, n), rows)
    bucket = jnp.full(n, len(c.lengths) - 1, jnp.int32) if bucket is None else bucket

    def result(j: Array | int) -> tuple[Any, Array]:
        micro = jax.tree.map(lambda x: x[j], micros)
        return jax.lax.switch(bucket[j], [lambda micro, t=t: _padded(one(_cut(micro, t)), T) for t in c.lengths], micro)

    if n == 1:
        return result(0)

    def body(j: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
        summed, spoken = result(j)
        return add(carry[0], summed), carry[1].at[j].set(spoken)

    per_token = jnp.zeros((n, jax.tree.leaves(micros)[0].shape[1], T), jnp.float32)
    summed, per_token = jax.lax.fori_loop(0, jnp.sum(bucket >= 0), body, (zero, per_token))
    return summed, join_rows(per_token)


def _cut(micro: Any, t: int) -> Any:
    """Per-token arrays up to t tokens; of images only the positions are such."""

    def cut(x: Any) -> Any:
        if isinstance(x, Images):
            return x._replace(position=x.position[:, :t])
        return x[:, :t] if x.ndim == 2 else x

    return jax.tree.map(cut, micro, is_leaf=lambda x: isinstance(x, Images))


def _padded(result: tuple[Any, Array], T: int) -> tuple[Any, Array]:
    summed, spoken = result
    return summed, jnp.pad(spoken, ((0, 0), (0, T - spoken.shape[1])))


def split_rows(x: Array, n: int) -> Array:
    """[b, ...] -> [n, b/n, ...]: part j holds the rows r with r mod n == j."""
    return x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)


def join_rows(x: Array) -> Array:
    """Inverse of `split_rows`."""
    return x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def split_slots(x: Array, M: int, G: int) -> Array:
    """[P*G, ...] -> [M, P/M*G, ...]: entry m holds the slots s with s mod M == m, in order."""
    slots = x.reshape(x.shape[0] // (M * G), M, G, *x.shape[1:])
    return slots.swapaxes(0, 1).reshape(M, -1, *x.shape[1:])


def join_slots(x: Array, G: int) -> Array:
    """Inverse of `split_slots`."""
    M, rows = x.shape[:2]
    return x.reshape(M, rows // G, G, *x.shape[2:]).swapaxes(0, 1).reshape(M * rows, *x.shape[2:])
