"""config.json of a checkpoint in Hugging Face's format, read and written through its family's table of settings."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from popo_jax.model_config import ModelConfig, RopeScaling
from popo_jax.models import vision_config
from popo_jax.models.families import FAMILIES, ROPE
from popo_jax.models.json_files import read_json, write_json
from popo_jax.types import UserError

TIED = "tie_word_embeddings"


def read_config(folder: epath.PathLike) -> ModelConfig:
    """The shape in a folder's config.json; precision and scheduling are left at their defaults.

    Errors: UserError for an unknown family, or a variant of one that is not built here.
    """
    path = epath.Path(folder) / "config.json"
    data = read_json(path)
    family = FAMILIES.get(str(data.get("model_type")))
    if family is None:
        raise UserError(f"{path}: model_type must be one of {', '.join(FAMILIES)}, got {data.get('model_type')!r}")
    data |= _of_text(data)
    rope = _rope_of(data, path)
    found = {**family.defaults, **data, **({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})}
    _refuse_variants(found, path)
    width, heads = (_setting(ModelConfig, name, found.get(key), key, path) for name, key in _BASE)
    derived = {"num_key_value_heads": heads, "head_dim": width // heads}
    found |= {key: value for key, value in derived.items() if found[key] is None}
    fields = {ours: _setting(ModelConfig, ours, found.get(key), key, path) for ours, key in family.settings.items()}
    scaling = _scaling(rope, fields["max_positions"], path)
    c = ModelConfig(**{"family": data["model_type"], "rope_scaling": scaling, **family.implied, **fields})
    c = _with_vision(c, data, path) if c.sees else c
    if c.heads % c.kv_heads or c.head_dim % 2:
        raise UserError(
            f"{path}: num_attention_heads must be a multiple of num_key_value_heads and head_dim even, "
            f"got {c.heads}, {c.kv_heads} and {c.head_dim}"
        )
    return c


def _of_text(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a nested config says of its decoder. As transformers 5 has it, embeddings are tied if either part says so."""
    text = {k: v for k, v in (data.get("text_config") or {}).items() if k != "model_type"}
    return {k: v for k, v in text.items() if k != TIED or (v and not data.get(TIED))}


def _with_vision(c: ModelConfig, data: Mapping[str, Any], path: epath.Path) -> ModelConfig:
    v = vision_config.read(data, path)
    if sum(v.mrope) != c.head_dim // 2:
        raise UserError(f"{path}: mrope_section must add up to half of head_dim ({c.head_dim // 2}), got {list(v.mrope)}")
    return dataclasses.replace(c, vision=v)


def save_config(
    folder: epath.PathLike, c: ModelConfig, *, eos_ids: Sequence[int], pad_id: int, bos_id: int | None = None
) -> None:
    """config.json and generation_config.json; `read_config` gives back the shape of `c`."""
    folder, family = epath.Path(folder), FAMILIES[c.family]
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else list(eos_ids), "pad_token_id": pad_id}
    fixed = {
        "architectures": [family.architecture],
        "model_type": c.family,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": c.param_dtype,
    }
    settings = {key: getattr(c, ours) for ours, key in family.settings.items()}
    scaling = {key: getattr(c.rope_scaling, ours) for ours, key in ROPE[c.rope_scaling.kind].items()}
    if c.rope_scaling.kind != "none":
        named = {"rope_type": c.rope_scaling.kind} | {k: v for k, v in scaling.items() if v is not None}
        settings["rope_scaling"] = named
    settings |= family.written
    if c.sees:  # as transformers 5 nests them
        text = {
            **settings,
            "model_type": "qwen2_5_vl_text",
            **ids,
            "rope_scaling": {"type": "mrope", "mrope_section": list(c.vision.mrope)},
        }
        tied = {TIED: c.tie_embeddings}
        settings = {"text_config": text, "vision_config": vision_config.config_of(c), **vision_config.tokens_of(c), **tied}
        write_json(folder / vision_config.PROCESSOR, vision_config.processor_of(c))
    write_json(folder / "config.json", {**fixed, **settings, **ids})
    write_json(folder / "generation_config.json", {"do_sample": False} | ids)


_BASE = (("width", "hidden_size"), ("heads", "num_attention_heads"))


def _setting(cls: type, name: str, value: Any, key: str, path: epath.Path) -> Any:
    """`value` if it suits the field: a number above 0, a whole one for an int, a bool, null where the field may be None."""
    hint = typing.get_type_hints(cls)[name]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds and name != "vocab_size":
        return None
    kind = next(k for k in kinds if k is not type(None))
    if kind is bool:
        good, expected = isinstance(value, bool), "true or false"
    else:
        numeric = (int, float) if kind is float else int
        good, expected = isinstance(value, numeric) and not isinstance(value, bool) and value > 0, "a number above 0"
    if not good:
        raise UserError(f"{path}: {key} must be {expected}, got {value!r}")
    return float(value) if kind is float else value


def _rope_of(data: Mapping[str, Any], path: epath.Path) -> dict[str, Any]:
    """rope_parameters (transformers 5), with rope_scaling (before) over it."""
    both: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        part = data.get(key) or {}
        if not isinstance(part, Mapping):
            raise UserError(f"{path}: {key} must be a mapping, got {part!r}")
        both |= part
    return both


def _scaling(rope: Mapping[str, Any], max_positions: int, path: epath.Path) -> RopeScaling:
    """Defaults are transformers' own: the original length is the present one, yarn's factor their ratio."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = "none" if kind in ("default", "mrope") else kind  # whose three positions are the family's
    if kind not in ROPE:
        raise UserError(f"{path}: rope_scaling's rope_type must be one of default, linear, llama3, yarn, got {kind!r}")
    original = {"original_max_position_embeddings": max_positions}
    given = {k: v for k, v in rope.items() if v is not None}
    fields = {
        ours: _setting(RopeScaling, ours, (original | given)[key], f"rope_scaling's {key}", path)
        for ours, key in ROPE[kind].items()
        if key in original | given
    }
    s = RopeScaling(**{"kind": kind, **fields})
    if kind == "yarn" and "factor" not in fields:
        s = dataclasses.replace(s, factor=max_positions / s.original_positions)
    elif kind != "none" and "factor" not in fields:
        raise UserError(f"{path}: rope_scaling's factor must be a number above 0, got nothing")
    scales: list[Any] = [given.get(k) for k in ("mscale", "mscale_all_dim")]
    if kind == "yarn" and s.attention_factor is None and all(scales):
        a, b = (0.1 * m * math.log(s.factor) + 1.0 if s.factor > 1 else 1.0 for m in scales)
        s = dataclasses.replace(s, attention_factor=a / b)
    return s


def _refuse_variants(data: Mapping[str, Any], path: epath.Path) -> None:
    """Errors: UserError for what changes the forward pass and is not built here."""

    def need(key: str, value: Any, good: bool, expected: str) -> None:
        if not good:
            raise UserError(f"{path}: {key} must be {expected}, got {value!r}")

    need("hidden_act", data.get("hidden_act"), data.get("hidden_act", "silu") == "silu", "silu")
    partial = data.get("partial_rotary_factor", 1.0)
    need("partial_rotary_factor", partial, partial in (None, 1.0), "1.0")
    if data["model_type"] == "mistral":  # its window is every layer's
        return
    full = data.get("max_window_layers", 28) >= (data.get("num_hidden_layers") or 0)
    slides = data.get("use_sliding_window", False) and data.get("sliding_window", 4096) is not None and not full
    need("use_sliding_window", True, not slides, "false, or max_window_layers at least num_hidden_layers")
    layers = data.get("layer_types") or []
    need("layer_types", layers, all(t == "full_attention" for t in layers), "full_attention in every layer")
