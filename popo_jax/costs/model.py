"""FLOPs that a policy's step takes by arithmetic: what the compiled program is compared with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from popo_jax.costs.hlo import Array, Instruction
from popo_jax.model_config import ModelConfig

SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}
"""Pass of the attention kernel -> products of (queries x keys x head) it makes; the backward passes make the scores again."""


@dataclass(frozen=True)
class ModelFlops:
    """Of training on rows of T tokens, all devices together: a forward pass is 1, its gradient 2."""

    matmul_parameters: int
    """N: weights that every token is multiplied with, the head among them, the embedding table not."""
    tokens: int
    attention: float
    """Of one forward pass: causal, so half of all (query, key) pairs, 2 products of 2 FLOPs."""

    def passes(self, n: float) -> float:
        """2ND and the attention of n forward passes: 3 are a gradient's (6ND), 4 with all activations computed again (8ND)."""
        return n * (2.0 * self.matmul_parameters * self.tokens + self.attention)


def model_flops(c: ModelConfig, rows: int, T: int) -> ModelFlops:
    """Of `rows` rows, every one of T tokens."""
    assert c.vocab_size is not None
    attn = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    n = c.layers * (attn + 3 * c.width * c.mlp) + c.width * c.vocab_size
    attention = 2.0 * T * T * c.heads * c.head_dim * c.layers * rows
    return ModelFlops(n, rows * T, attention)


def kernel_flops(i: Instruction, operands: Sequence[Array]) -> float | None:
    """Of a Pallas splash attention call, from its shapes: the mask's blocks [1, n, n], queries [.., heads, T, head_dim].

    A causal mask's n x n blocks are computed up to the diagonal; a grid narrowed for a window, whole. None: another kernel.
    """
    found = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", i.name + i.source)
    queries = next((a for a in operands if len(a.shape) == 4), None)
    blocks = next((a for a in operands if a.dtype == "s8" and len(a.shape) == 3), None)
    if found is None or queries is None or blocks is None:
        return None
    *heads, length, width = queries.shape
    _, n, m = blocks.shape
    share = (n + 1) / (2 * n) if n == m else m / n
    pairs = share * length * length
    for h in heads:
        pairs *= h
    return 2.0 * SPLASH[found[1]] * pairs * width
