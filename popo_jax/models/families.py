"""The families of checkpoints: for each one table of names and one of settings, read in both directions.

A family whose blocks are those of `Decoder` is added by an entry in FAMILIES, its name in `ModelConfig.family`, and what
differs in the forward pass as a property of ModelConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NAMES: dict[str, str] = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attn_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/attn/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attn/q/bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/attn/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attn/k/bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/attn/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attn/v/bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/attn/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
"""Qwen2's: path in our parameters -> name in the checkpoint, {} the layer. Kernels are [in, out] here and [out, in] there."""

OUTPUT_BIAS = {"layers/attn/o/bias": "model.layers.{}.self_attn.o_proj.bias"}
QK_NORM = {
    "layers/attn/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers/attn/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
}
MLP_BIAS = {f"layers/mlp/{x}/bias": f"model.layers.{{}}.mlp.{x}_proj.bias" for x in ("gate", "up", "down")}

VISION_NAMES = {
    "vision/patch/weight": "visual.patch_embed.proj.weight",
    "vision/layers/attn_norm/scale": "visual.blocks.{}.norm1.weight",
    "vision/layers/attn/qkv/kernel": "visual.blocks.{}.attn.qkv.weight",
    "vision/layers/attn/qkv/bias": "visual.blocks.{}.attn.qkv.bias",
    "vision/layers/attn/o/kernel": "visual.blocks.{}.attn.proj.weight",
    "vision/layers/attn/o/bias": "visual.blocks.{}.attn.proj.bias",
    "vision/layers/mlp_norm/scale": "visual.blocks.{}.norm2.weight",
    **{f"vision/layers/mlp/{x}/kernel": f"visual.blocks.{{}}.mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    **{f"vision/layers/mlp/{x}/bias": f"visual.blocks.{{}}.mlp.{x}_proj.bias" for x in ("gate", "up", "down")},
    "vision/merger/norm/scale": "visual.merger.ln_q.weight",
    "vision/merger/first/kernel": "visual.merger.mlp.0.weight",
    "vision/merger/first/bias": "visual.merger.mlp.0.bias",
    "vision/merger/second/kernel": "visual.merger.mlp.2.weight",
    "vision/merger/second/bias": "visual.merger.mlp.2.bias",
}

SETTINGS: dict[str, str] = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "rms_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
"""Field of ModelConfig -> key of config.json, in every family."""
BIAS = {"attention_bias": "attention_bias"}

DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "num_key_value_heads": None,
    "head_dim": None,
}
"""What transformers takes for a key that is not there; None: from other keys."""


@dataclass(frozen=True)
class Family:
    """How one `model_type` of Hugging Face's format is read and written."""

    architecture: str
    names: Mapping[str, str]
    settings: Mapping[str, str]
    defaults: Mapping[str, Any]
    implied: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig that config.json does not speak of."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of a config.json made here."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of names that some checkpoints have -> those of `names`."""


FAMILIES: Mapping[str, Family] = {
    "qwen2": Family(
        "Qwen2ForCausalLM",
        NAMES,
        SETTINGS | BIAS,  # transformers has the biases always; false: a policy made here, its zeros are written
        DEFAULTS | {"attention_bias": True},
        written={"use_sliding_window": False},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**NAMES, **OUTPUT_BIAS, **QK_NORM},
        SETTINGS | BIAS,
        DEFAULTS | {"attention_bias": False, "head_dim": 128},
        written={"use_sliding_window": False},
    ),
    "llama": Family(
        "LlamaForCausalLM",
        {**NAMES, **OUTPUT_BIAS, **MLP_BIAS},
        SETTINGS | BIAS | {"mlp_bias": "mlp_bias"},
        DEFAULTS | {"attention_bias": False, "mlp_bias": False, "max_position_embeddings": 2048},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        NAMES,
        SETTINGS | {"window": "sliding_window"},
        DEFAULTS | {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
        implied={"attention_bias": False},
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        {**NAMES, **VISION_NAMES},
        SETTINGS,
        DEFAULTS | {"num_key_value_heads": 8, "rope_theta": 1000000.0, "rms_norm_eps": 1e-5},
        implied={"attention_bias": True},
        written={"use_sliding_window": False},
        renamed={"model.language_model.": "model.", "model.visual.": "visual."},
    ),
}
"""model_type -> family."""

ROPE: Mapping[str, Mapping[str, str]] = {
    "none": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_positions": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_positions": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
    },
}
"""Kind of stretched rotary positions -> field of RopeScaling -> key of rope_scaling."""
