"""Where activations and weights lie while a model split over a mesh computes (fully sharded data parallelism).

The residual stream is split by its rows alone; each weight is brought together from its parts along `fsdp` right before it is
used, and its gradient taken apart again. Left to itself the compiler splits what a split weight multiplies: every device
computes all rows, and logits travel.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from popo_jax.sharding import BATCH, RULES, param_specs, row_shards

STAY_SPLIT: dict[str, Any] = {**RULES, "embed": None}
"""The rules of a weight in use: split over `tensor` alone."""


def by_rows(x: Float[Array, "B ..."], mesh: Mesh | None) -> Float[Array, "B ..."]:
    """`x` split by rows, and by nothing else; left as it is where the mesh's (data, fsdp) do not divide them."""
    if mesh is None or mesh.size == 1 or x.shape[0] % row_shards(mesh.shape):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH))


def brought(params: Any, dtype: Any, mesh: Mesh | None, *, below: str = "") -> Any:
    """Weights as a computation in `dtype` uses them: matrices cast, then gathered over `fsdp`, their gradients split over it.

    params: a tree of parameters, or one block of the stacked ones with `below` where they lie ("layers").
    """
    if mesh is None or mesh.size == 1:
        return params
    tree, sizes, names = params, dict(mesh.shape), below.split("/") if below else []
    for name in reversed(names):
        tree = {name: tree}
    whole, split = (_specs(tree, sizes, rules, stacked=not below) for rules in (STAY_SPLIT, RULES))
    placed = jax.tree.map(lambda x, w, s: _brought(x, dtype, NamedSharding(mesh, w), NamedSharding(mesh, s)), tree, whole, split)
    for name in names:
        placed = placed[name]
    return placed


def _specs(tree: Any, sizes: dict[str, int], rules: Any, *, stacked: bool) -> Any:
    if stacked:
        return param_specs(tree, sizes, rules)
    one_layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), tree)
    return jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), param_specs(one_layer, sizes, rules), is_leaf=_is_spec)


def _brought(x: Array, dtype: Any, whole: NamedSharding, split: NamedSharding) -> Array:
    if x.ndim < 2:  # biases and scales: whole already, and norms read theirs in float32
        return x
    return _gather(x.astype(dtype), whole, split)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: Array, whole: NamedSharding, split: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(x, whole)


def _gather_fwd(x: Array, whole: NamedSharding, split: NamedSharding) -> tuple[Array, None]:
    return _gather(x, whole, split), None


def _gather_bwd(whole: NamedSharding, split: NamedSharding, _: None, g: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(g, split),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
