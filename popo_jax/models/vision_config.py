"""The vision tower's part of config.json, and the image processor's files beside it: how images are scaled and normalised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from etils import epath

from popo_jax.model_config import ModelConfig, VisionConfig
from popo_jax.models.json_files import read_json, write_json
from popo_jax.types import UserError

PROCESSOR = "preprocessor_config.json"
NESTED, PART = "processor_config.json", "image_processor"
"""The file in which transformers 5 writes the same, and the key of it."""
SETTINGS: Mapping[str, str] = {
    "layers": "depth",
    "width": "hidden_size",
    "heads": "num_heads",
    "mlp": "intermediate_size",
    "patch": "patch_size",
    "merge": "spatial_merge_size",
    "temporal": "temporal_patch_size",
    "window": "window_size",
}
"""Field of VisionConfig -> key of vision_config, all whole numbers."""
DEFAULTS = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "intermediate_size": 3420}
FULL = "fullatt_block_indexes"
TOKENS = {"image_token": "image_token_id", "start_token": "vision_start_token_id", "end_token": "vision_end_token_id"}
CLIP = {"image_mean": VisionConfig.mean, "image_std": VisionConfig.std}
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
"""Qwen2.5-VL's own, where a checkpoint says nothing."""
BICUBIC = 3
"""Pillow's number of it."""


def read(data: Mapping[str, Any], path: epath.Path) -> VisionConfig:
    """Of a config.json, and of the image processor's file beside it if there is one. Errors: UserError, one sentence."""
    found = DEFAULTS | dict(_mapping(data.get("vision_config"), f"{path}: vision_config"))
    fields: dict[str, Any] = {ours: _whole(found.get(key), f"{path}: vision_config's {key}") for ours, key in SETTINGS.items()}
    full = found.get(FULL, (7, 15, 23, 31))
    fields["full_layers"] = tuple(_whole(i, f"{path}: vision_config's {FULL}", 0) for i in full)
    for key, values in (("hidden_act", ("silu",)), ("in_channels", (3,)), ("in_chans", (3,))):
        if found.get(key, values[0]) not in values:
            raise UserError(f"{path}: vision_config's {key} must be {values[0]}, got {found[key]!r}")
    if found.get("out_hidden_size", data.get("hidden_size")) != data.get("hidden_size"):
        raise UserError(
            f"{path}: vision_config's out_hidden_size must be hidden_size ({data.get('hidden_size')}), "
            f"got {found['out_hidden_size']!r}"
        )
    fields |= {ours: _whole(data.get(key), f"{path}: {key}", 0) for ours, key in TOKENS.items()}
    v = VisionConfig(**fields, mrope=_sections(data, path))
    _check(v, str(path))
    return _processed(v, *_processor(path.parent))


def _sections(data: Mapping[str, Any], path: epath.Path) -> tuple[int, ...]:
    both = {**(data.get("rope_parameters") or {}), **(data.get("rope_scaling") or {})}
    found = both.get("mrope_section")
    if not isinstance(found, (list, tuple)) or len(found) != 3:
        raise UserError(f"{path}: rope_scaling's mrope_section must be three whole numbers, got {found!r}")
    return tuple(_whole(n, f"{path}: rope_scaling's mrope_section", 0) for n in found)


def _processor(folder: epath.Path) -> tuple[Mapping[str, Any], str]:
    """An image processor's settings, and where they are: as in transformers 5 the nested ones win. No file: no settings."""
    nested, path = folder / NESTED, folder / PROCESSOR
    given = read_json(nested).get(PART) if nested.exists() else None
    if given is not None:
        return _mapping(given, f"{nested}: {PART}"), f"{nested}, {PART}:"
    return read_json(path) if path.exists() else {}, f"{path}:"


def _processed(v: VisionConfig, data: Mapping[str, Any], where: str) -> VisionConfig:
    """With the sizes and colours of an image processor, older (min_pixels) or newer (size)."""
    for key, ours in (("patch_size", v.patch), ("merge_size", v.merge), ("temporal_patch_size", v.temporal)):
        if data.get(key, ours) != ours:
            raise UserError(f"{where} {key} must be that of vision_config ({ours}), got {data[key]!r}")
    done = all(data.get(k, True) for k in ("do_resize", "do_rescale", "do_normalize"))
    if not done or data.get("rescale_factor", 1 / 255) != 1 / 255 or data.get("resample", BICUBIC) != BICUBIC:
        raise UserError(f"{where} images must be resized bicubically, rescaled by 1/255 and normalised, got other settings")
    size = PIXELS | {k: n for k, n in _mapping(data.get("size") or {}, f"{where} size").items() if k in PIXELS}
    low = _whole(data.get("min_pixels") or size["shortest_edge"], f"{where} min_pixels")
    high = _whole(data.get("max_pixels") or size["longest_edge"], f"{where} max_pixels")
    colours = {
        ours: _colours(data.get(key, CLIP[key]), f"{where} {key}") for ours, key in (("mean", "image_mean"), ("std", "image_std"))
    }
    return replace(v, min_pixels=low, max_pixels=high, **colours)  # type: ignore[arg-type]


def _check(v: VisionConfig, where: str) -> None:
    rules = (
        (v.width % v.heads == 0 and v.width // v.heads % 4 == 0, "hidden_size must be a multiple of 4 num_heads", v.width),
        (v.window >= v.cell, f"window_size must hold a cell of {v.cell} pixels", v.window),
        (all(i < v.layers for i in v.full_layers), f"{FULL} must be below depth ({v.layers})", list(v.full_layers)),
    )
    for holds, expected, got in rules:
        if not holds:
            raise UserError(f"{where}: vision_config's {expected}, got {got}")


def config_of(c: ModelConfig) -> dict[str, Any]:
    """vision_config of a config.json made here."""
    v = c.vision
    out: dict[str, Any] = {key: getattr(v, ours) for ours, key in SETTINGS.items()}
    more = {"model_type": "qwen2_5_vl_vision", "hidden_act": "silu", "in_channels": 3, "out_hidden_size": c.width}
    return out | {FULL: list(v.full_layers)} | more


def tokens_of(c: ModelConfig) -> dict[str, Any]:
    """Top-level keys of a config.json: which tokens an image has."""
    return {key: getattr(c.vision, ours) for ours, key in TOKENS.items()}


def processor_of(c: ModelConfig) -> dict[str, Any]:
    """preprocessor_config.json, which transformers' AutoProcessor opens."""
    v = c.vision
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "size": {"shortest_edge": v.min_pixels, "longest_edge": v.max_pixels},
        "patch_size": v.patch,
        "merge_size": v.merge,
        "temporal_patch_size": v.temporal,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "resample": BICUBIC,
        "image_mean": list(v.mean),
        "image_std": list(v.std),
    }


def write_limits(folder: epath.Path, c: ModelConfig) -> None:
    """Into the image processor's files of a checkpoint, so that they scale images as `c` does; none there: a new one."""
    nested, plain = folder / NESTED, folder / PROCESSOR
    whole = read_json(nested) if nested.exists() else {}
    if whole.get(PART) is not None:
        write_json(nested, whole | {PART: _limited(whole[PART], c)})
    elif not plain.exists():
        write_json(plain, processor_of(c))
    if plain.exists():
        write_json(plain, _limited(read_json(plain), c))


def _limited(data: Mapping[str, Any], c: ModelConfig) -> dict[str, Any]:
    """min_pixels and max_pixels, which win over size, only where they stand already."""
    low, high = c.vision.min_pixels, c.vision.max_pixels
    older = {k: n for k, n in (("min_pixels", low), ("max_pixels", high)) if k in data}
    return {**data, **older, "size": {"shortest_edge": low, "longest_edge": high}}


def _mapping(x: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(x, Mapping):
        raise UserError(f"{what} must be a mapping, got {x!r}")
    return x


def _whole(x: Any, what: str, low: int = 1) -> int:
    if not isinstance(x, int) or isinstance(x, bool) or x < low:
        raise UserError(f"{what} must be a whole number from {low}, got {x!r}")
    return x


def _colours(x: Any, what: str) -> tuple[float, ...]:
    if not isinstance(x, (list, tuple)) or len(x) != 3 or not all(isinstance(n, (int, float)) for n in x):
        raise UserError(f"{what} must be three numbers, got {x!r}")
    return tuple(float(n) for n in x)
