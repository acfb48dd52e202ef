"""What of a policy is trained: all of it, or low-rank adapters (arXiv:2106.09685), which live in the same dict of parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from popo_jax.model_config import LoraConfig, ModelConfig

Params = dict[str, Any]
ADAPTER = ("lora_a", "lora_b")


def without(c: ModelConfig) -> ModelConfig:
    """The same policy without adapters."""
    return replace(c, lora=LoraConfig())


def split(params: Params, c: ModelConfig) -> tuple[Params, Params]:
    """(what is trained, what is frozen), two dicts that share no leaf. Without LoRA nothing is frozen."""
    if c.lora.rank is None:
        return params, {}
    flat = flatten_dict(params)
    trained = {path: x for path, x in flat.items() if path[-1] in ADAPTER}
    return unflatten_dict(trained), unflatten_dict({path: x for path, x in flat.items() if path not in trained})


def join(trained: Params, frozen: Params) -> Params:
    """Inverse of `split`."""
    return unflatten_dict({**flatten_dict(trained), **flatten_dict(frozen)}) if frozen else trained


def merge(params: Params, c: ModelConfig) -> Params:
    """Parameters of `without(c)`: kernel + alpha / rank * a b, added in float32."""
    if c.lora.rank is None:
        return params
    flat = flatten_dict(params)
    for path in [path for path in flat if path[-1] == "lora_a"]:
        a, b = (flat.pop((*path[:-1], name)).astype(jnp.float32) for name in ADAPTER)
        kernel = flat[(*path[:-1], "kernel")]
        delta = jnp.einsum("lir,lro->lio", a, b, precision="highest") * (c.lora.alpha / c.lora.rank)
        flat[(*path[:-1], "kernel")] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
    return unflatten_dict(flat)
