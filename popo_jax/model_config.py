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
class VisionConfig:
    """Shape of Qwen2.5-VL's vision tower, and of the images it reads; with family qwen2_5_vl alone."""

    layers: int = 2
    width: int = 64
    heads: int = 2
    mlp: int = 128
    patch: int = 7
    """Pixels of a patch's side."""
    merge: int = 2
    """Patches of the side of what becomes one token."""
    temporal: int = 2
    """Frames of a patch; an image is the same one in each."""
    window: int = 28
    """Pixels of the side of a window, beyond which only `full_layers` see."""
    full_layers: tuple[int, ...] = (1,)
    mrope: tuple[int, ...] = (4, 6, 6)
    """Frequencies of the decoder's rotary positions that speak of time, row and column; head_dim / 2 together."""
    image_token: int | None = None
    """Id that stands for a token of an image, and those around it; None: the tokenizer's."""
    start_token: int | None = None
    end_token: int | None = None
    min_pixels: int = 784
    """Images are scaled so that they have as many pixels at least,"""
    max_pixels: int = 1003520
    """and at most."""
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    """Of red, green and blue from 0 to 1, which is subtracted,"""
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    """and what is divided by."""

    @property
    def cell(self) -> int:
        """Pixels of the side of what becomes one token."""
        return self.patch * self.merge

    @property
    def window_cells(self) -> int:
        """Tokens of a window's side."""
        return self.window // self.cell

    @property
    def window_patches(self) -> int:
        return (self.window_cells * self.merge) ** 2


@dataclass(frozen=True)
class ModelConfig:
    """Shape and precision of a decoder. With `policy.path` the shape comes from there."""

    family: Literal["qwen2", "qwen3", "llama", "mistral", "qwen2_5_vl"] = "qwen2"
    """Whose architecture and checkpoint format: qwen3 norms queries and keys, qwen2_5_vl has a vision tower."""

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
    vision: VisionConfig = VisionConfig()

    @property
    def sees(self) -> bool:
        return self.family == "qwen2_5_vl"

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    @property
    def output_bias(self) -> bool:
        return self.attention_bias and self.family in ("qwen3", "llama")


MODEL_HOW = ("dtype", "param_dtype", "remat", "linear", "attention", "lora", "head_chunk")
"""Fields of ModelConfig that say how to compute; the others are a checkpoint's shape."""
