"""Model FLOPs by formula: what the mathematics asks for, not what a program does.

2 for each multiply-add of a matrix product: the products with weights, q k' and weights v of attention, the head; embedding
look-up, norms, softmax and the optimizer count nothing. A query attends to itself and what is before it, so causal
attention over T tokens has T (T + 1) / 2 pairs: half of the rectangle that a plain implementation computes. Work done
twice to save memory (`remat`) is counted once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from popo_jax.model_config import ModelConfig


def weights(c: ModelConfig) -> int:
    """Entries of the blocks' weight matrices, each of which meets every token once."""
    attention = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    return c.layers * (attention + 3 * c.width * c.mlp)


def head(c: ModelConfig) -> int:
    """Entries of the head's matrix, tied or not."""
    assert c.vocab_size is not None
    return c.width * c.vocab_size


def forward(c: ModelConfig, *, rows: int, tokens: int, logits: int | None = None, rectangle: bool = False) -> int:
    """One pass over `rows` of `tokens` each, logits at `logits` positions of a row (None: all).

    rectangle: count tokens^2 pairs, as a program without a causal kernel does, to compare with its `cost_analysis()`.
    """
    pairs = tokens * tokens if rectangle else tokens * (tokens + 1) // 2
    logits = tokens if logits is None else logits
    return rows * (2 * tokens * weights(c) + 2 * logits * head(c) + _attention(c, pairs))


def seen(c: ModelConfig, *, windows: int) -> int:
    """One pass of the vision tower over as many whole windows, which are taken for one image."""
    v = c.vision
    patches, cell = windows * v.window_patches, v.merge**2
    weights = v.width * 3 * v.patch**2 + v.layers * (4 * v.width**2 + 3 * v.width * v.mlp)
    merger = cell * v.width * (cell * v.width + c.width)
    pairs = len(v.full_layers) * patches**2 + (v.layers - len(v.full_layers)) * patches * v.window_patches
    return 2 * patches * weights + 2 * patches // cell * merger + 4 * pairs * v.width


def train(c: ModelConfig, *, rows: int, tokens: int, mini_batches: int = 1, windows: int = 0) -> int:
    """A train step: forward, and backward twice that. Several mini-batches need one more forward pass over all rows first.

    windows: of each row's images.
    """
    row = forward(c, rows=1, tokens=tokens) + (seen(c, windows=windows) if windows else 0)
    return (3 + (mini_batches > 1)) * rows * row


def decode(c: ModelConfig, *, tokens: int, seen: int) -> int:
    """`tokens` tokens through the cache, that together see `seen` slots, their own included."""
    return 2 * tokens * (weights(c) + head(c)) + _attention(c, seen)


def sampled(c: ModelConfig, *, prompts: int, prompt: int, lengths: Sequence[int] | np.ndarray) -> int:
    """Prompts of `prompt` tokens prefilled once each, then responses of these lengths, the first token from the prefill."""
    return forward(c, rows=prompts, tokens=prompt, logits=1) + decode(c, **decoded(prompt, lengths))


def decoded(prompt: int, lengths: Sequence[int] | np.ndarray) -> dict[str, int]:
    """`tokens` and `seen` of all decode steps: a response of n tokens takes n - 1, the j-th of which sees prompt + j slots."""
    n = np.asarray(lengths, np.int64) - 1
    return {"tokens": int(n.sum()), "seen": int((n * prompt + n * (n + 1) // 2).sum())}


def decode_bytes(c: ModelConfig, *, steps: int, seen: int) -> int:
    """Bytes that decoding cannot help reading: all weights at each of `steps` steps, keys and values of the slots seen."""
    size = 4 if c.dtype == "float32" else 2
    return size * (steps * (weights(c) + head(c)) + seen * c.layers * 2 * c.kv_heads * c.head_dim)


def _attention(c: ModelConfig, pairs: int) -> int:
    return 4 * pairs * c.layers * c.heads * c.head_dim
