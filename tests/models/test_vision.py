"""Qwen2.5-VL against transformers, on random small checkpoints that it makes: features, positions, logits, decoding."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popo_jax import scenes
from popo_jax.models import hf, vision
from popo_jax.models.decoder import Decoder
from popo_jax.scenes import NOWHERE, Pixels, Sizes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IMAGE, VIDEO, START, END = 101, 102, 103, 104
SHAPES = {
    "windows of 2 x 2 cells": {"window_size": 28, "fullatt_block_indexes": [1, 3], "depth": 4},
    "windows of 4 x 4, whole last": {"window_size": 56, "fullatt_block_indexes": [2], "depth": 3},
    "windows of a cell, none whole": {"window_size": 14, "fullatt_block_indexes": [], "depth": 2},
    "odd windows, all whole": {"window_size": 49, "fullatt_block_indexes": [0, 1], "depth": 2},
    "untied, cells of 9 patches": {"window_size": 42, "fullatt_block_indexes": [1], "depth": 2, "spatial_merge_size": 3},
}
PROMPTS = {2: [((6, 10),), ((4, 2), (10, 6)), (), ((2, 2),)], 3: [((6, 9),), ((3, 3), (9, 3)), (), ((12, 6),)]}
"""By merge size: the grids of each prompt's images; one has none."""


@functools.cache
def checkpoint(tmp, name):
    more = dict(SHAPES[name])
    torch.manual_seed(len(name))
    tied = "untied" not in name
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "rope_parameters": rope, "tie_word_embeddings": tied}
    tower = {"hidden_size": 24, "intermediate_size": 40, "num_heads": 2, "patch_size": 7, "out_hidden_size": 32}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text | {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0},
        vision_config=tower | more,
        tie_word_embeddings=tied,
        **ids,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.12 + (1.0 if p.ndim == 1 and p.mean() == 1 else 0.0))
    folder = tmp / name.replace(" ", "-")
    model.save_pretrained(folder)
    c = hf.read_config(folder)
    return model, dataclasses.replace(c, linear="plain", attention="xla"), folder


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("vl")


def prompts(c, seed=0):
    """(tokens, pixels) of each prompt: words around its images."""
    rng, out = np.random.default_rng(seed), []
    for grids in PROMPTS[c.vision.merge]:
        tokens = list(rng.integers(3, 100, 3))
        for g in grids:
            tokens += [START, *[IMAGE] * scenes.cells(g, c.vision), END, *rng.integers(3, 100, 2)]
        tokens += list(rng.integers(3, 100, 4))
        patches = [rng.integers(0, 256, (h * w, 3 * 49)).astype(np.uint8) for h, w in grids]
        out.append((np.array(tokens, np.int32), Pixels(np.concatenate([np.zeros((0, 147), np.uint8), *patches]), grids)))
    return out


def theirs(model, c, tokens, pixels):
    """transformers' (features, positions, logits) of one row."""
    x = pixels.patches.reshape(-1, 3, 49) / 255.0
    x = (x - np.array(c.vision.mean)[:, None]) / np.array(c.vision.std)[:, None]
    x = torch.tensor(np.repeat(x[:, :, None], 2, axis=2).reshape(len(x), 3 * 2 * 49), dtype=torch.float32)
    ids, kinds = torch.tensor(tokens)[None].long(), torch.tensor((tokens == IMAGE).astype(int))[None]
    grid = torch.tensor([[1, *g] for g in pixels.grids])
    seen = {"pixel_values": x, "image_grid_thw": grid} if pixels.grids else {}
    with torch.no_grad():
        found = model.model.visual(x, grid).pooler_output.numpy() if seen else np.zeros((0, c.width))
        position = model.model.get_rope_index(ids, kinds, grid)[0][:, 0].numpy().T if seen else None
        logits = model(input_ids=ids, mm_token_type_ids=kinds, **seen).logits[0].numpy()
    return found, position, logits


def laid(c, some, T=None, start=None, spare=1):
    made = [scenes.scene(pixels, tokens, c.vision) for tokens, pixels in some]
    n = max(len(s.patches) for s in made) // c.vision.window_patches + spare
    sizes = Sizes(n, max(len(s.order) for s in made) + 2)
    return made, scenes.lay_out(made, sizes, T or max(len(t) for t, _ in some) + 3, c.vision, start)


def padded(some, T):
    return np.stack([np.pad(t, (0, T - len(t))) for t, _ in some])


@pytest.mark.parametrize("name", SHAPES)
def test_features_positions_and_logits_are_transformers(tmp, name):
    """All prompts in one batch: padded windows, padded rows, a row of text alone."""
    model, c, folder = checkpoint(tmp, name)
    params, some = hf.load(folder, c), prompts(c)
    made, images = laid(c, some)
    found = vision.features(params["vision"], images, c, None, wrap=lambda f: f, local=False)
    logits = jax.jit(Decoder(c).logits)(params, padded(some, images.position.shape[1]), images)
    for i, (tokens, pixels) in enumerate(some):
        features, position, expected = theirs(model, c, tokens, pixels)
        np.testing.assert_allclose(found[i, : len(features)], features, atol=1e-4)
        assert not np.any(found[i, len(features) :])
        if position is not None:
            np.testing.assert_array_equal(made[i].position, position)
        np.testing.assert_allclose(logits[i, : len(tokens)], expected, atol=1e-4)
        assert np.abs(expected).max() > 1 and (len(features) == 0 or np.abs(features).max() > 0.5)


@pytest.mark.parametrize("name", ["windows of 2 x 2 cells", "untied, cells of 9 patches"])
def test_a_checkpoint_may_say_in_its_text_config_alone_that_it_is_tied(tmp, tmp_path, name):
    """Where transformers wrote it before version 5, and looks for it still."""
    model, c, folder = checkpoint(tmp, name)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = config.pop("tie_word_embeddings")
    shutil.copytree(folder, tmp_path / "older")
    (tmp_path / "older" / "config.json").write_text(json.dumps(config))
    older = dataclasses.replace(hf.read_config(tmp_path / "older"), linear=c.linear, attention=c.attention)
    assert older == c and c.tie_embeddings == ("untied" not in name)
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "older", older), hf.load(folder, c))
    there = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "older")
    assert torch.equal(there.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("name", list(SHAPES)[:2])
def test_decoding_over_the_cache_is_the_whole_pass(tmp, name):
    """Prompts on the right of their rows, then five tokens one by one, an image's token that the model chose among them."""
    _, c, folder = checkpoint(tmp, name)
    model, params, some = Decoder(c), hf.load(folder, c), prompts(c)
    more = np.random.default_rng(5).integers(3, 100, (len(some), 5)).astype(np.int32)
    more[:, 2] = IMAGE
    S = max(len(t) for t, _ in some) + 2
    start = np.array([S - len(t) for t, _ in some])
    made, right = laid(c, some, S, start)
    tokens = np.stack([np.pad(t, (s, 0)) for (t, _), s in zip(some, start, strict=True)])
    weights = model.for_decode(params)
    logits, cache = jax.jit(model.prefill, static_argnums=3)(weights, tokens, start, S + 5, right)
    shift = np.array([s.shift for s in made])
    got, decode = [logits], jax.jit(model.decode)
    for j in range(4):
        logits, cache = decode(weights, cache, more[:, j], jnp.int32(S + j), start, shift)
        got.append(logits)
    whole = [(np.concatenate([t, m]), p) for (t, p), m in zip(some, more, strict=True)]
    T = max(len(t) for t, _ in whole)
    _, images = laid(c, some, T)
    expected = jax.jit(model.logits)(params, padded(whole, T), images)
    for i, (t, _) in enumerate(some):
        for j in range(5):
            np.testing.assert_allclose(got[j][i], expected[i, len(t) - 1 + j], atol=2e-5)
    assert len(set(shift.tolist())) > 1


def test_what_is_saved_transformers_loads_with_the_same_logits(tmp):
    for name in ("windows of 2 x 2 cells", "untied, cells of 9 patches"):
        model, c, folder = checkpoint(tmp, name)
        out = folder / "saved"
        hf.save(out, hf.load(folder, c), c, eos_ids=(1,), pad_id=0)
        again, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        read = hf.read_config(out)
        assert dataclasses.replace(read, linear="plain", attention="xla") == c
        tokens, pixels = prompts(c)[1]
        np.testing.assert_allclose(theirs(again.eval(), c, tokens, pixels)[2], theirs(model, c, tokens, pixels)[2], atol=1e-5)


def test_names_of_other_versions_are_read(tmp):
    """transformers 4.52 and later call them model.visual and model.language_model while they run, and some saved them so."""
    from safetensors.numpy import load_file, save_file

    _, c, folder = checkpoint(tmp, "windows of 2 x 2 cells")
    other = folder / "other"
    other.mkdir(exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    old = {"visual.": "model.visual.", "model.": "model.language_model."}
    renamed = {next(new + k.removeprefix(o) for o, new in old.items() if k.startswith(o)): v for k, v in tensors.items()}
    save_file(renamed, other / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, hf.load(other, c), hf.load(folder, c))


def test_padding_and_what_stands_in_it_change_nothing(tmp):
    _, c, folder = checkpoint(tmp, "windows of 2 x 2 cells")
    params, some = hf.load(folder, c), prompts(c)
    _, images = laid(c, some, 60)
    _, wide = laid(c, some, 60, spare=4)
    noise = np.random.default_rng(1).integers(0, 256, wide.patches.shape).astype(np.uint8)
    wide = wide._replace(patches=np.where(wide.place[..., :1] == NOWHERE, noise, wide.patches))
    run = jax.jit(Decoder(c).logits)
    a, b = (run(params, padded(some, 60), x) for x in (images, wide))
    for i, (t, _) in enumerate(some):
        np.testing.assert_allclose(a[i, : len(t)], b[i, : len(t)], atol=1e-5)


def test_gradients_are_finite_and_reach_the_tower_alone_through_images(tmp):
    """In bfloat16 with splash, with remat; a row of text gives the tower none."""
    _, c, folder = checkpoint(tmp, "windows of 2 x 2 cells")
    params, some = hf.load(folder, c), prompts(c)
    for changes in ({"remat": "full"}, {"dtype": "bfloat16", "attention": "splash"}):
        model = Decoder(dataclasses.replace(c, **changes))

        def loss(params, tokens, images, model=model):
            return model.logprobs(params, tokens, temperature=1.0, images=images)[0].sum()

        for rows, moved in ((some, True), ([some[2]], False)):
            _, images = laid(c, rows, 60)
            grads = jax.jit(jax.grad(loss))(params, padded(rows, 60), images)
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
            assert all(bool(np.any(x)) == moved for x in jax.tree.leaves(grads["vision"]["merger"]))
            assert all(bool(np.any(x)) == moved for x in jax.tree.leaves(grads["vision"]["patch"]))
