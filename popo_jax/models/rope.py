"""Rotary positions (RoFormer, arXiv:2104.09864), and how checkpoints stretch them beyond their first length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from popo_jax.model_config import ModelConfig, RopeScaling

Rope = tuple[Float[Array, "*B T H/2"], Float[Array, "*B T H/2"]]
"""Cosines and sines."""


def rope(position: Int[Array, "*B T"], c: ModelConfig) -> Rope:
    """Cosine and sine of position x frequency, float32; yarn multiplies both by its attention factor."""
    angle = position[..., None].astype(jnp.float32) * frequencies(c)
    factor = attention_factor(c.rope_scaling)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def multimodal_rope(position_BT3: Int[Array, "*B T 3"], c: ModelConfig) -> Rope:
    """Each frequency turns with one of a token's three positions, time, row and column, as `vision.mrope` divides them
    (Qwen2-VL, arXiv:2409.12191). Where the three are the same it is `rope`."""
    of = np.repeat(np.arange(3), c.vision.mrope)
    angle = position_BT3[..., of].astype(jnp.float32) * frequencies(c)
    factor = attention_factor(c.rope_scaling)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def frequencies(c: ModelConfig) -> np.ndarray:
    """theta^(-2i/H) for i < H/2, stretched as `c.rope_scaling` says; float32 [H/2]."""
    plain = 1.0 / c.rope_theta ** (np.arange(0, c.head_dim, 2) / c.head_dim)
    return _STRETCH[c.rope_scaling.kind](plain, c).astype(np.float32)


def attention_factor(s: RopeScaling) -> float:
    if s.kind != "yarn":
        return 1.0
    if s.attention_factor is not None:
        return s.attention_factor
    return 0.1 * math.log(s.factor) + 1.0 if s.factor > 1 else 1.0


def _linear(f: np.ndarray, c: ModelConfig) -> np.ndarray:
    """Every frequency divided by the factor (arXiv:2306.15595)."""
    return f / c.rope_scaling.factor


def _llama3(f: np.ndarray, c: ModelConfig) -> np.ndarray:
    """Long wavelengths divided by the factor, short ones kept, in between a blend linear in rotations (Llama 3.1)."""
    s = c.rope_scaling
    rotations = s.original_positions * f / (2 * math.pi)
    kept = np.clip((rotations - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
    return f / s.factor * (1 - kept) + f * kept


def _yarn(f: np.ndarray, c: ModelConfig) -> np.ndarray:
    """Divided by the factor or kept, by a ramp over the dimensions between two numbers of rotations (arXiv:2309.00071)."""
    s, H = c.rope_scaling, c.head_dim

    def dimension(rotations: float) -> float:
        return H * math.log(s.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    high = high + 0.001 if low == high else high  # as transformers has it
    stretched = np.clip((np.arange(H // 2) - low) / (high - low), 0.0, 1.0)
    return f / s.factor * stretched + f * (1 - stretched)


_STRETCH: Mapping[str, Callable[[np.ndarray, ModelConfig], np.ndarray]] = {
    "none": lambda f, c: f,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
