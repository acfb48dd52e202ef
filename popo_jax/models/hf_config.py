"""config.json of a Qwen2 in Hugging Face's format, read and written through one table of settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from popo_jax.config import ModelConfig
from popo_jax.types import UserError

SETTINGS: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp": "intermediate_size",
    "rope_theta": "rope_theta",
    "rms_eps": "rms_norm_eps",
    "attention_bias": "attention_bias",
    "tie_embeddings": "tie_word_embeddings",
}
"""Field of ModelConfig -> key of config.json."""

DEFAULTS: Mapping[str, Any] = {
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "num_key_value_heads": None,
    "head_dim": None,
}
"""What transformers' Qwen2 takes for a key that is not there; None: from other keys."""


def read_config(folder: epath.PathLike) -> ModelConfig:
    """The shape in a folder's config.json; precision and scheduling are left at their defaults.

    Errors: UserError for anything but a Qwen2 with plain rotary positions and full attention.
    """
    path = epath.Path(folder) / "config.json"
    data = read_json(path)
    _refuse_variants(data, path)
    rope = data.get("rope_parameters") or {}
    found = {**DEFAULTS, **data, **({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})}
    width, heads = (_number(found.get(key), int, key, path) for key in ("hidden_size", "num_attention_heads"))
    derived = {"num_key_value_heads": heads, "head_dim": width // heads}
    found |= {key: value for key, value in derived.items() if found[key] is None}
    kinds = {f.name: type(f.default) for f in dataclasses.fields(ModelConfig)}
    c = ModelConfig(**{ours: _number(found.get(key), kinds[ours], key, path) for ours, key in SETTINGS.items()})
    if c.heads % c.kv_heads or c.head_dim % 2:
        raise UserError(
            f"{path}: num_attention_heads must be a multiple of num_key_value_heads and head_dim even, "
            f"got {c.heads}, {c.kv_heads} and {c.head_dim}"
        )
    return c


def save_config(
    folder: epath.PathLike, c: ModelConfig, *, eos_ids: Sequence[int], pad_id: int, bos_id: int | None = None
) -> None:
    """config.json and generation_config.json; `read_config` gives back the shape of `c`."""
    folder = epath.Path(folder)
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else list(eos_ids), "pad_token_id": pad_id}
    fixed = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "use_cache": True,
        "use_sliding_window": False,
        "torch_dtype": c.param_dtype,
    }
    write_json(folder / "config.json", fixed | {key: getattr(c, ours) for ours, key in SETTINGS.items()} | ids)
    write_json(folder / "generation_config.json", {"do_sample": False} | ids)


def read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON object from a file. Errors: UserError, one sentence."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError:
        raise UserError(f"{path}: must be JSON, got something else") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a JSON object, got {type(data).__name__}")
    return data


def write_json(path: epath.Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _number(value: Any, kind: type, key: str, path: epath.Path) -> Any:
    """`value` if it is a positive whole number (kind int, or the vocabulary's None), a positive number, or a bool."""
    if kind is bool:
        good, expected = isinstance(value, bool), "true or false"
    else:
        numeric = (int, float) if kind is float else int
        good, expected = isinstance(value, numeric) and not isinstance(value, bool) and value > 0, "a number above 0"
    if not good:
        raise UserError(f"{path}: {key} must be {expected}, got {value!r}")
    return float(value) if kind is float else value


def _refuse_variants(data: Mapping[str, Any], path: epath.Path) -> None:
    """Errors: UserError for what changes the forward pass and is not built here."""

    def need(key: str, value: Any, good: bool, expected: str) -> None:
        if not good:
            raise UserError(f"{path}: {key} must be {expected}, got {value!r}")

    need("model_type", data.get("model_type"), data.get("model_type") == "qwen2", "qwen2")
    need("hidden_act", data.get("hidden_act"), data.get("hidden_act", "silu") == "silu", "silu")
    for key in ("rope_scaling", "rope_parameters"):
        rope = data.get(key) or {}
        plain = isinstance(rope, dict) and {rope.get("rope_type", "default"), rope.get("type", "default")} == {"default"}
        need(key, rope, plain, "of type default, without scaling")
    full = data.get("max_window_layers", 28) >= (data.get("num_hidden_layers") or 0)
    slides = data.get("use_sliding_window", False) and data.get("sliding_window", 4096) is not None and not full
    need("use_sliding_window", True, not slides, "false, or max_window_layers at least num_hidden_layers")
    types = data.get("layer_types") or []
    need("layer_types", types, all(t == "full_attention" for t in types), "full_attention in every layer")
