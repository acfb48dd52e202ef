"""How weights and rows are split over a mesh: logical axes, declared once per weight, and one mapping to mesh axes.

Knows no device: sizes of mesh axes come as a mapping, results are trees of PartitionSpec.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

ROW_AXES = ("data", "fsdp")
BATCH = PartitionSpec(ROW_AXES)
"""Rows of a batch."""

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv": "tensor",
    "mlp": "tensor",
    "norm": None,
    "rank": None,
    "tower": None,
}
"""Logical axis -> mesh axis."""

INTO = {f"attn/{x}": "embed" for x in "qkv"} | {"attn/o": "heads", "mlp/gate": "embed", "mlp/up": "embed", "mlp/down": "mlp"}
OUT_OF = {"attn/q": "heads", "attn/k": "kv", "attn/v": "kv", "attn/o": "embed"} | {
    "mlp/gate": "mlp",
    "mlp/up": "mlp",
    "mlp/down": "embed",
}
"""Linear layer of a block -> logical axis of what goes in, and of what comes out."""

AXES: Mapping[str, tuple[str, ...]] = {
    "embed/embedding": ("vocab", "embed"),
    "layers/attn_norm/scale": ("layers", "norm"),
    "layers/attn/q/kernel": ("layers", "embed", "heads"),
    "layers/attn/q/bias": ("layers", "heads"),
    "layers/attn/k/kernel": ("layers", "embed", "kv"),
    "layers/attn/k/bias": ("layers", "kv"),
    "layers/attn/v/kernel": ("layers", "embed", "kv"),
    "layers/attn/v/bias": ("layers", "kv"),
    "layers/attn/q_norm/scale": ("layers", "norm"),
    "layers/attn/k_norm/scale": ("layers", "norm"),
    "layers/attn/o/kernel": ("layers", "heads", "embed"),
    "layers/attn/o/bias": ("layers", "norm"),
    "layers/mlp_norm/scale": ("layers", "norm"),
    "layers/mlp/gate/kernel": ("layers", "embed", "mlp"),
    "layers/mlp/gate/bias": ("layers", "mlp"),
    "layers/mlp/up/kernel": ("layers", "embed", "mlp"),
    "layers/mlp/up/bias": ("layers", "mlp"),
    "layers/mlp/down/kernel": ("layers", "mlp", "embed"),
    "layers/mlp/down/bias": ("layers", "norm"),
    **{f"layers/{x}/lora_a": ("layers", axis, "rank") for x, axis in INTO.items()},
    **{f"layers/{x}/lora_b": ("layers", "rank", axis) for x, axis in OUT_OF.items()},
    "norm/scale": ("norm",),
    "head/kernel": ("embed", "vocab"),
    "vision/patch/weight": ("embed", "tower", "tower", "tower", "tower"),
    "vision/layers/attn_norm/scale": ("layers", "norm"),
    "vision/layers/attn/qkv/kernel": ("layers", "embed", "tower"),
    "vision/layers/attn/qkv/bias": ("layers", "norm"),
    "vision/layers/attn/o/kernel": ("layers", "tower", "embed"),
    "vision/layers/attn/o/bias": ("layers", "norm"),
    "vision/layers/mlp_norm/scale": ("layers", "norm"),
    **{f"vision/layers/mlp/{x}/kernel": ("layers", "embed", "tower") for x in ("gate", "up")},
    "vision/layers/mlp/down/kernel": ("layers", "tower", "embed"),
    **{f"vision/layers/mlp/{x}/bias": ("layers", "norm") for x in ("gate", "up", "down")},
    "vision/merger/norm/scale": ("norm",),
    "vision/merger/first/kernel": ("embed", "tower"),
    "vision/merger/first/bias": ("norm",),
    "vision/merger/second/kernel": ("tower", "embed"),
    "vision/merger/second/bias": ("norm",),
}
"""Path in the parameters -> logical axis of each of the weight's axes."""


def row_shards(mesh_sizes: Mapping[str, int]) -> int:
    """Devices that the rows of a batch are split over."""
    return math.prod(mesh_sizes[name] for name in ROW_AXES)


def param_specs(params: Any, mesh_sizes: Mapping[str, int] | None = None, rules: Mapping[str, Any] = RULES) -> Any:
    """A PartitionSpec, one entry per axis, for every weight of a tree of arrays or ShapeDtypeStructs.

    mesh_sizes: devices along each mesh axis; an axis they do not divide is left whole. Errors: ValueError for an
    undeclared weight or another number of axes.
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: _spec(_spell(path), x.shape, mesh_sizes, rules), params)


def like_params(tree: Any, specs: Any) -> Any:
    """Specs for a tree that repeats the parameters' paths inside (an optimizer's moments): each leaf gets the spec of
    the parameter whose path its own ends with, if it has as many axes; the others (counters) are replicated."""
    known = {_spell(path): spec for path, spec in jax.tree_util.tree_flatten_with_path(specs, is_leaf=_is_spec)[0]}

    def of(path: jax.tree_util.KeyPath, x: Any) -> PartitionSpec:
        parts = _spell(path).split("/")
        names = ("/".join(parts[i:]) for i in range(len(parts)))
        return next((known[n] for n in names if n in known and len(known[n]) == len(x.shape)), PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, tree)


def _spec(path: str, shape: tuple[int, ...], sizes: Mapping[str, int] | None, rules: Mapping[str, Any]) -> PartitionSpec:
    axes = AXES.get(path, ())
    if len(axes) != len(shape):
        raise ValueError(f"sharding: {path} of shape {shape} has no logical axes declared, expected {axes or 'a path in AXES'}")

    def split(size: int, axis: str) -> Any:
        onto = rules[axis]
        over = 1
        for name in (onto,) if isinstance(onto, str) else onto or ():
            over *= 1 if sizes is None else sizes.get(name, 1)
        return onto if size % over == 0 else None

    return PartitionSpec(*(split(*pair) for pair in zip(shape, axes, strict=True)))


def _spell(path: jax.tree_util.KeyPath) -> str:
    """a/0/b of dict keys, attributes and positions."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
