"""FLOPs of Pallas kernels, which a compiled program does not tell."""

from __future__ import annotations

import re
from collections.abc import Sequence

from popo_jax.costs.hlo import Array, Instruction

SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}
"""Pass of the attention kernel -> products of (queries x keys x head) it makes; the backward passes make the scores again."""


def kernel_flops(i: Instruction, operands: Sequence[Array]) -> float | None:
    """Of a Pallas splash attention call, from its shapes: the mask's blocks [1, n, n], queries [.., heads, T, head_dim].

    A causal mask's n x n blocks are computed up to the diagonal; a grid narrowed for a window, whole, and so is one without
    blocks (all see all of their segment). None: another kernel.
    """
    found = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", i.name + i.source)
    queries = next((a for a in operands if len(a.shape) == 4), None)
    blocks = next((a for a in operands if a.dtype == "s8" and len(a.shape) == 3), None)
    if found is None or queries is None:
        return None
    *heads, length, width = queries.shape
    _, n, m = (1, 1, 1) if blocks is None else blocks.shape
    share = (n + 1) / (2 * n) if n == m else m / n
    pairs = share * length * length
    for h in heads:
        pairs *= h
    return 2.0 * SPLASH[found[1]] * pairs * width
