"""Shape and precision of a policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched beyond the length a model was first trained on."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_positions: int = 8192
    """Length before stretching; llama3 and yarn."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_positions / low are stretched in full."""
    high_freq_factor: float = 4.0
    """llama3: those below original_positions / high not at all."""
    beta_fast: float = 32.0
    """yarn: rotations over the original length above which a dimension keeps its frequency."""
    beta_slow: float = 1.0
    """yarn: and below which it is stretched in full."""
    truncate: bool = True
    """yarn: round the two bounds to whole dimensions."""
    attention_factor: float | None = None
    """yarn: what cosines and sines are multiplied by; None: 0.1 ln(factor) + 1."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen weights: x w + alpha / rank * (x a) b (arXiv:2106.09685)."""

    rank: int | None = None
    """None: off, every weight is trained."""
    alpha: float = 32.0
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """Linear layers of a block that have adapters."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape and precision of a decoder. With `policy.path` the shape comes from there."""

    family: Literal["qwen2", "qwen3", "llama", "mistral"] = "qwen2"
    """Whose architecture and checkpoint format: qwen3 norms queries and keys."""

    vocab_size: int | None = None
    """None: the tokenizer's."""
    layers: int = 3
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 384
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    max_positions: int = 32768
    """Longest sequence the model was made for."""
    window: int | None = None
    """Tokens a query sees, itself included; None: all before it. mistral."""
    rms_eps: float = 1e-6
    attention_bias: bool = True
    """Of queries, keys and values; with qwen3 and llama of the output too."""
    mlp_bias: bool = False
    """llama."""
    tie_embeddings: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again: nothing, all but matrix products, whole blocks."""
    linear: Literal["auto", "plain", "barrier"] = "auto"
    """How the backward of a linear layer is scheduled; auto: barrier on CPU (same numbers, faster), else plain."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Of whole rows, in training: xla keeps all scores; cudnn (a GPU, bfloat16) and splash (a TPU) are flash kernels. auto: the
    flash kernel where there is one for the platform and dtype is bfloat16, else xla."""
    head_chunk: int | None = None
    """Positions whose logits exist at once in training, computed again for the gradient; None: all where that is at most
    0.5 GB a device, else as many as make so much."""

    lora: LoraConfig = LoraConfig()

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    @property
    def output_bias(self) -> bool:
        return self.attention_bias and self.family in ("qwen3", "llama")


MODEL_HOW = ("dtype", "param_dtype", "remat", "linear", "attention", "lora", "head_chunk")
"""Fields of ModelConfig that say how to compute; the others are a checkpoint's shape."""
