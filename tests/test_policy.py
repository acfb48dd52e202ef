"""A policy's folder: described, and written again as it was."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import popo_jax.policy as policies
from popo_jax import sft
from popo_jax.config import ChatConfig, Config, PolicyConfig, SampleConfig
from popo_jax.data.pictures import Eyes
from popo_jax.data.tokenizer import characters
from popo_jax.model_config import ModelConfig
from popo_jax.models.decoder import Decoder
from popo_jax.policy import Policy
from popo_jax.types import UserError
from tests import tiny

SHAPE = ModelConfig(
    vocab_size=99, layers=1, width=8, heads=2, kv_heads=1, head_dim=4, mlp=8, max_positions=64, linear="barrier", attention="xla"
)
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint as a hub might have it: with keys and files that are nothing to us."""
    made, params = Policy(SHAPE, characters()), Decoder(SHAPE).init(jax.random.key(0))
    policies.save(tmp_path / "there", made, params)
    config = tmp_path / "there" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"transformers_version": "4.1", "dtype": "float32"}))
    (tmp_path / "there" / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "there" / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6}')
    return tmp_path / "there"


def test_a_loaded_policy_keeps_its_files(folder, tmp_path):
    policy = policies.describe(folder, Config(model=ModelConfig(param_dtype="bfloat16")))
    assert policy.tokenizer.eos_ids == (1, 2)
    policies.save(tmp_path / "run", policy, None)
    assert not list((tmp_path / "run").glob("*.safetensors"))
    again = policies.describe(tmp_path / "run", Config())
    assert (again.model, again.tokenizer.eos_ids) == (replace(policy.model, param_dtype="float32"), (1, 2))
    policies.save(tmp_path / "out", policy, Decoder(SHAPE).init(jax.random.key(0)))
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["transformers_version"], config["torch_dtype"], config.get("dtype")) == ("4.1", "bfloat16", None)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(w.dtype) for w in weights.values()} == {"bfloat16"}
    np.testing.assert_allclose(
        weights["model.embed_tokens.weight"].astype(np.float32),
        load_file(folder / "model.safetensors")["model.embed_tokens.weight"],
        rtol=2**-8,
    )


PROCESSORS = {
    "as made here": {},
    "older": {"preprocessor_config.json": {"min_pixels": 3136, "max_pixels": 12845056, "image_std": [0.5, 0.5, 0.5]}},
    "newer": {"preprocessor_config.json": {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, "patch_size": 14}},
    "in another file": {"preprocessor_config.json": None, "processor_config.json": {"image_processor": {"min_pixels": 3136}}},
    "twice": {"processor_config.json": {"image_processor": {"min_pixels": 3136}, "processor_class": "Qwen2_5_VLProcessor"}},
    "none": {"preprocessor_config.json": None},
    "none, whose file has another use": {"preprocessor_config.json": None, "processor_config.json": {"processor_class": "X"}},
}
"""Files of a checkpoint, beside or in place of those made here; None: gone."""


@pytest.mark.parametrize("files", PROCESSORS.values(), ids=PROCESSORS)
def test_what_is_exported_scales_images_as_the_run_did(tmp_path, files):
    """With transformers' own processor; a run's folder and an export have the run's limits, whatever file has them."""
    image = pytest.importorskip("PIL.Image")
    library = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    made = sft.fresh_policy(tiny.config(**tiny.SEES))
    policies.save(tmp_path / "there", made, None)
    for name, data in files.items():
        path = tmp_path / "there" / name
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_text(json.dumps(data))
    run = policies.describe(tmp_path / "there", tiny.config(images__min_pixels=40000, images__max_pixels=60000))
    policies.save(tmp_path / "run", run, None)
    again = policies.describe(tmp_path / "run", tiny.config())
    assert again.model.vision == run.model.vision and again.model.vision.max_pixels == 60000
    policies.save(tmp_path / "out", again, None)
    processor = library.Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "out")
    pictures = [image.new("RGB", size, "red") for size in ((56, 84), (500, 200))]
    theirs = processor(images=pictures, return_tensors="np")
    seen = Eyes(run.model.vision, lambda _: pictures).pixels({}, "here")
    assert seen.grids == tuple(map(tuple, theirs["image_grid_thw"][:, 1:].tolist()))
    for path in (tmp_path / "out").glob("*processor_config.json"):
        kept, data = json.loads(path.read_text()), files.get(path.name) or {}
        assert "60000" in path.read_text() or data == {"processor_class": "X"}
        assert all(kept[k] == data[k] for k in ("patch_size", "image_std", "processor_class") if k in data)


def test_a_row_longer_than_the_model_was_made_for_is_refused(folder):
    c = Config(sample=SampleConfig(max_prompt_tokens=32, max_response_tokens=33))
    with pytest.raises(UserError, match=r"must be at most the 64 positions that .* was made for, got 65$"):
        policies.describe(folder, c)
    assert policies.describe(folder, Config(sample=SampleConfig(max_prompt_tokens=32, max_response_tokens=32)))


def test_a_loaded_tokenizer_without_pad_or_template_is_told_in_a_sentence_each(folder):
    """Llama 3 has no pad token, base models no template: neither is needed, both had better be known."""
    c = Config(policy=PolicyConfig(str(folder)), sample=SampleConfig(max_prompt_tokens=8, max_response_tokens=8))
    assert policies.lacks(policies.describe(folder, c), c) == []
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "pad_token"}))
    policy = policies.describe(folder, c)
    pad, chat = policies.lacks(policy, c)
    assert pad == f"{folder} names no pad token: none is needed, what fills up a row is never read"
    assert chat.startswith(f"{folder} has no chat template: problems are asked as they are")
    assert policies.lacks(policy, replace(c, chat=ChatConfig(template=False))) == [pad]
    assert policies.lacks(policy, Config()) == []  # a policy made here
