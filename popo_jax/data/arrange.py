"""Rows of a batch in the order in which the train step takes them: long ones together, so that padding need not be computed.

A mini-batch is taken apart into micro-batches of equal numbers of rows (`rl/micro.py`); each is computed up to the least of the
run's few lengths that holds its rows, and those with nothing to count not at all. Both are data: shapes never change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from popo_jax.config import Config
from popo_jax.scenes import Repeated


def arrange(rows: Mapping[str, Any], c: Config) -> tuple[dict[str, Any], np.ndarray]:
    """(a batch's fields with `bucket` i32 [M, n] beside them, order [B]): row i of the result is row order[i] of `rows`.

    Rows change places within their mini-batch alone (slots s with s mod M == m), and not at all where that is one micro-batch.
    Micro-batch j of a mini-batch's b rows holds the rows i with i mod n == j: as many on every shard. bucket: which of
    `c.lengths` a micro-batch needs, longest first; -1, at the end, where no row has a counted token.
    """
    B, M, n, G = len(rows["adv"]), c.batch.mini_batches, c.micro_batches, c.batch.group_size
    needed = needed_lengths(rows["token_mask"])
    order, bucket = np.arange(B), np.zeros((M, n), np.int32)
    for m in range(M):
        places = np.flatnonzero(np.arange(B) // G % M == m)
        if n > 1:
            by_micro_batch = places.reshape(-1, n).T.ravel()
            order[by_micro_batch] = places[np.argsort(-needed[places], kind="stable")]
        longest = needed[order[places]].reshape(-1, n).max(axis=0)
        bucket[m] = np.where(longest > 0, np.searchsorted(c.lengths, longest), -1)
    return {k: _ordered(v, order) for k, v in rows.items()} | {"bucket": bucket}, order


def _ordered(rows: Any, order: np.ndarray) -> Any:
    """An array, or a tuple of them such as `Images`."""
    if isinstance(rows, tuple):
        return type(rows)(*(_ordered(x, order) for x in rows))
    return rows.ordered(order) if isinstance(rows, Repeated) else rows[order]


def put_back(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """What the train step says of its rows, in the order of the slots."""
    out = np.empty_like(values)
    out[order] = values
    return out


def needed_lengths(token_mask: np.ndarray) -> np.ndarray:
    """int [B]: tokens of each row up to its last counted one; 0 where none counts."""
    T = token_mask.shape[1]
    return np.where(token_mask.any(axis=1), T - np.argmax(token_mask[:, ::-1], axis=1), 0)
