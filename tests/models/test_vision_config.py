"""config.json and preprocessor_config.json of Qwen2.5-VL: flat as on the hub, nested as transformers 5 writes it, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from popo_jax.models.hf_config import read_config
from popo_jax.types import UserError

FLAT = json.loads((Path(__file__).parents[2] / "configs/shapes/qwen2.5-vl-3b/config.json").read_text())
HOW = "images must be resized bicubically, rescaled by 1/255 and normalised"
TIED = "tie_word_embeddings"
TOP = ("architectures", "model_type", "vision_config", TIED)


def folder(tmp_path, config=FLAT, processor=None, whole=None):
    files = {"config.json": config, "preprocessor_config.json": processor, "processor_config.json": whole}
    for name, data in files.items():
        if data is not None:
            (tmp_path / name).write_text(json.dumps(data))
    return tmp_path


def nested():
    tokens = [k for k in FLAT if k.endswith("_token_id") and k != "eos_token_id"]
    text = {k: v for k, v in FLAT.items() if k not in (*TOP, *tokens)}
    return {k: FLAT[k] for k in (*TOP, *tokens)} | {"text_config": text | {"model_type": "qwen2_5_vl_text"}}


def test_the_hubs_3b_is_what_it_is(tmp_path):
    c = read_config(folder(tmp_path))
    assert (c.family, c.layers, c.width, c.heads, c.kv_heads, c.head_dim) == ("qwen2_5_vl", 36, 2048, 16, 2, 128)
    assert c.sees and c.attention_bias and c.tie_embeddings and c.rope_theta == 1e6
    v = c.vision
    assert (v.layers, v.width, v.heads, v.mlp, v.patch, v.merge, v.window) == (32, 1280, 16, 3420, 14, 2, 112)
    assert v.full_layers == (7, 15, 23, 31) and v.mrope == (16, 24, 24)
    assert (v.image_token, v.start_token, v.end_token) == (151655, 151652, 151653)
    assert (v.cell, v.window_cells, v.window_patches) == (28, 4, 64)


def test_a_nested_one_says_the_same(tmp_path):
    flat, deep = tmp_path / "flat", tmp_path / "deep"
    flat.mkdir(), deep.mkdir()
    assert read_config(folder(deep, nested())) == read_config(folder(flat))


@pytest.mark.parametrize("top", [True, False, None])
@pytest.mark.parametrize("text", [True, False, None])
def test_embeddings_are_tied_as_transformers_has_it(tmp_path, top, text):
    """Its own configs say it at the top; those that it wrote before version 5, in text_config."""
    transformers = pytest.importorskip("transformers")
    config = {k: v for k, v in nested().items() if k != TIED} | ({} if top is None else {TIED: top})
    config["text_config"] |= {} if text is None else {TIED: text}
    theirs = transformers.AutoConfig.from_pretrained(folder(tmp_path, config))
    assert read_config(tmp_path).tie_embeddings == theirs.tie_word_embeddings == bool(top or text)
    theirs.save_pretrained(tmp_path)
    assert read_config(tmp_path).tie_embeddings == bool(top or text)


@pytest.mark.parametrize(
    ("processor", "pixels"),
    [
        (None, (56 * 56, 28 * 28 * 1280)),
        (
            {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2},
            (3136, 12845056),
        ),
        ({"size": {"shortest_edge": 3136, "longest_edge": 50176}}, (3136, 50176)),
        ({}, (56 * 56, 28 * 28 * 1280)),
    ],
    ids=["none", "older", "newer", "defaults"],
)
def test_sizes_of_images_are_the_processors(tmp_path, processor, pixels):
    v = read_config(folder(tmp_path, processor=processor)).vision
    assert (v.min_pixels, v.max_pixels) == pixels


@pytest.mark.parametrize(
    ("whole", "processor"),
    [
        ({"image_processor": {"size": {"shortest_edge": 3136, "longest_edge": 50176}}}, None),
        ({"image_processor": {"min_pixels": 3136, "max_pixels": 50176}}, None),
        ({"image_processor": {"min_pixels": 3136, "max_pixels": 50176}}, {"min_pixels": 784, "max_pixels": 100352}),
        ({"processor_class": "Qwen2_5_VLProcessor"}, {"min_pixels": 3136, "max_pixels": 50176}),
        ({"image_processor": None}, {"min_pixels": 3136, "max_pixels": 50176}),
    ],
    ids=["newer", "older", "both", "older, whose file has another use", "null"],
)
def test_a_processor_may_stand_in_another_file(tmp_path, whole, processor):
    """Which one transformers opens, we open; it has its own limits, not those of a checkpoint without any."""
    library = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    v = read_config(folder(tmp_path, processor=processor, whole=whole)).vision
    theirs = library.Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size
    assert (v.min_pixels, v.max_pixels) == (3136, 50176) == (theirs["shortest_edge"], theirs["longest_edge"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vision_config": None}, "vision_config must be a mapping, got None"),
        (
            {"vision_config": {**FLAT["vision_config"], "hidden_act": "gelu"}},
            "vision_config's hidden_act must be silu, got 'gelu'",
        ),
        (
            {"vision_config": {**FLAT["vision_config"], "depth": "32"}},
            "vision_config's depth must be a whole number from 1, got '32'",
        ),
        ({"vision_config": {**FLAT["vision_config"], "out_hidden_size": 7}}, "out_hidden_size must be hidden_size (2048), got 7"),
        ({"vision_config": {**FLAT["vision_config"], "fullatt_block_indexes": [32]}}, "must be below depth (32), got [32]"),
        ({"vision_config": {**FLAT["vision_config"], "window_size": 14}}, "window_size must hold a cell of 28 pixels, got 14"),
        ({"image_token_id": None}, "image_token_id must be a whole number from 0, got None"),
        ({"rope_scaling": None}, "mrope_section must be three whole numbers, got None"),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 25]}},
            "must add up to half of head_dim (64), got [16, 24, 25]",
        ),
    ],
)
def test_what_is_not_this_tower_is_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(UserError) as e:
        read_config(folder(tmp_path, FLAT | changes))
    assert sentence in str(e.value) and str(e.value).startswith(f"{tmp_path}/config.json: ")


@pytest.mark.parametrize(
    ("processor", "sentence"),
    [
        ({"patch_size": 16}, "patch_size must be that of vision_config (14), got 16"),
        ({"do_normalize": False}, f"{HOW}, got other settings"),
        ({"do_resize": False}, f"{HOW}, got other settings"),
        ({"resample": 2}, f"{HOW}, got other settings"),
        ({"image_mean": [0.5]}, "image_mean must be three numbers, got [0.5]"),
        ({"min_pixels": -1}, "min_pixels must be a whole number from 1, got -1"),
        ({"size": 3136}, "size must be a mapping, got 3136"),
    ],
)
def test_a_processor_of_another_kind_is_one_sentence(tmp_path, processor, sentence):
    with pytest.raises(UserError) as e:
        read_config(folder(tmp_path, processor=processor))
    assert str(e.value) == f"{tmp_path}/preprocessor_config.json: {sentence}"
    with pytest.raises(UserError) as e:
        read_config(folder(tmp_path, processor={}, whole={"image_processor": processor}))
    assert str(e.value) == f"{tmp_path}/processor_config.json, image_processor: {sentence}"
