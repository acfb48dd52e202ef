from __future__ import annotations

import dataclasses
import json

import pytest

from popo_jax.model_config import ModelConfig
from popo_jax.models.hf import read_config, save_config
from popo_jax.types import UserError

GOOD = {
    "model_type": "qwen2",
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}


def read(folder, **changes):
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (GOOD | changes).items() if v != "absent"}))
    return read_config(folder)


def test_the_shape_comes_from_the_file(tmp_path):
    assert read(tmp_path) == ModelConfig(
        vocab_size=31, layers=3, width=24, heads=6, kv_heads=3, head_dim=4, mlp=44, rope_theta=1e6, rms_eps=1e-6
    )


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"head_dim": 8}, "head_dim", 8),
        ({"head_dim": None}, "head_dim", 4),
        ({"num_key_value_heads": None}, "kv_heads", 6),
        ({"rope_theta": "absent"}, "rope_theta", 10000.0),
        ({"rope_theta": "absent", "rope_parameters": {"rope_type": "default", "rope_theta": 500}}, "rope_theta", 500.0),
        ({"rope_scaling": None}, "rope_theta", 1e6),
        ({"tie_word_embeddings": "absent"}, "tie_embeddings", False),
        ({"attention_bias": False}, "attention_bias", False),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}, "layers", 3),
        ({"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1}, "layers", 3),
    ],
)
def test_spellings_of_several_versions(tmp_path, changes, field, value):
    assert getattr(read(tmp_path, **changes), field) == value


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gemma"}, "model_type must be one of qwen2, qwen3, llama, mistral, qwen2_5_vl, got 'gemma'"),
        ({"model_type": "absent"}, "model_type must be one of qwen2, qwen3, llama, mistral, qwen2_5_vl, got None"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope_type must be one of default, linear, llama3, yarn"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling's factor must be a number above 0, got nothing"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling's factor must be a number above 0, got '2'"),
        ({"rope_scaling": "linear"}, "rope_scaling must be a mapping, got 'linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0, got 0.5"),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, "use_sliding_window must be false"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types must be full_attention"),
        ({"hidden_size": "absent"}, "hidden_size must be a number above 0, got None"),
        ({"num_attention_heads": "6"}, "num_attention_heads must be a number above 0, got '6'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a number above 0, got 0"),
        ({"vocab_size": True}, "vocab_size must be a number above 0, got True"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"num_key_value_heads": 4}, "got 6, 4 and 4"),
        ({"head_dim": 5}, "got 6, 3 and 5"),
    ],
)
def test_what_is_not_a_plain_qwen2_is_refused_in_one_sentence(tmp_path, changes, says):
    with pytest.raises(UserError) as error:
        read(tmp_path, **changes)
    assert says in str(error.value)
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"), [("{", "must be JSON"), ("[1]", "must be a JSON object, got list"), ("\x00\xff", "must be JSON")]
)
def test_a_broken_config_is_refused(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=says):
        read_config(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        read_config(tmp_path)


def test_written_and_read_back(tmp_path):
    c = ModelConfig(vocab_size=99, head_dim=16, rope_theta=500.0, rms_eps=1e-5, attention_bias=False, tie_embeddings=False)
    save_config(tmp_path, c, eos_ids=(7, 9), pad_id=3)
    assert read_config(tmp_path) == c
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"], generation["bos_token_id"]) == ([7, 9], 3, None)
    save_config(tmp_path, dataclasses.replace(c, layers=5), eos_ids=(7,), pad_id=3, bos_id=1)
    assert read_config(tmp_path).layers == 5
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (7, 1)
