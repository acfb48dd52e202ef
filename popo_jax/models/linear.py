"""Linear layers, with the backward pass scheduled by choice: `plain`, or `barrier` (same numbers, faster on CPU)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from popo_jax.model_config import ModelConfig

Kind = Literal["plain", "barrier"]


def resolve_linear(c: ModelConfig, platform: str) -> ModelConfig:
    """`c` with `linear: auto` decided for a platform ("cpu", "gpu", "tpu"): barrier on CPU, plain elsewhere."""
    if c.linear != "auto":
        return c
    return dataclasses.replace(c, linear="barrier" if platform == "cpu" else "plain")


def precision(x: Array) -> jax.lax.Precision:
    """Float32 means float32: accelerators otherwise multiply it in bfloat16 or TF32. CPU ignores it."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def linear(
    x: Float[Array, "*B D"], w: Float[Array, "D F"], b: Float[Array, " F"] | None = None, *, kind: Kind = "plain"
) -> Float[Array, "*B F"]:
    """x w + b in x's dtype.

    `barrier` keeps XLA:CPU from fusing the backward of what follows into the transposed copy it makes for the weight's
    gradient: the incoming gradient is computed once, then multiplied twice.
    """
    if kind not in _PRODUCT:
        raise ValueError(f"linear must be one of {', '.join(_PRODUCT)} by now, got {kind!r}")
    y = _PRODUCT[kind](x, w)
    return y if b is None else y + b


def _plain(x: Array, w: Array) -> Array:
    return jnp.dot(x, w, precision=precision(x))


@jax.custom_vjp
def _barrier(x: Array, w: Array) -> Array:
    return _plain(x, w)


def _barrier_fwd(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _plain(x, w), (x, w)


def _barrier_bwd(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = saved
    g = jax.lax.optimization_barrier(g)
    dw = _plain(x.reshape(-1, x.shape[-1]).T, g.reshape(-1, g.shape[-1]))
    return _plain(g, w.T), dw


_barrier.defvjp(_barrier_fwd, _barrier_bwd)
_PRODUCT: Mapping[str, Callable[[Array, Array], Array]] = {"plain": _plain, "barrier": _barrier}


def has_adapter(c: ModelConfig, name: str | None) -> bool:
    """Whether the linear layer of that name trains an adapter instead of its weights."""
    return c.lora.rank is not None and name in c.lora.targets


class Linear(nn.Module):
    """`linear` with its weights: kernel [D, features], bias [features] if any; lora_a [D, r], lora_b [r, features] likewise."""

    c: ModelConfig
    features: int
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        dtype = self.c.param_dtype
        w = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features), dtype)
        b = self.param("bias", nn.initializers.zeros, (self.features,), dtype) if self.bias else None
        y = linear(x, w.astype(x.dtype), None if b is None else b.astype(x.dtype), kind=self.c.linear)  # type: ignore[arg-type]
        return y + self._adapter(x) if has_adapter(self.c, self.name) else y

    def _adapter(self, x: Array) -> Array:
        """alpha / rank * (x a) b; zero at first, because b is."""
        rank, dtype = self.c.lora.rank, self.c.param_dtype
        assert rank is not None
        a = self.param("lora_a", nn.initializers.he_uniform(), (x.shape[-1], rank), dtype)
        b = self.param("lora_b", nn.initializers.zeros, (rank, self.features), dtype)
        return _plain(_plain(x, a.astype(x.dtype)), b.astype(x.dtype)) * jnp.asarray(self.c.lora.alpha / rank, x.dtype)
