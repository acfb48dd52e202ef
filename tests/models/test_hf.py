from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from popo_jax.model_config import ModelConfig
from popo_jax.models import hf
from popo_jax.models.decoder import Decoder, resolved
from popo_jax.types import UserError
from tests.golden.make_qwen2 import CASES

GOLDEN = Path(__file__).parents[1] / "golden"
C = ModelConfig(vocab_size=31, layers=2, width=24, heads=6, kv_heads=3, head_dim=8, mlp=40, linear="plain", attention="xla")
IDS = {"eos_ids": (2,), "pad_id": 0}


@functools.partial(jax.jit, static_argnums=0)
def logits(c: ModelConfig, params, tokens):
    return Decoder(resolved(c, "cpu")).logits(params, tokens)


@functools.cache
def drawn(c: ModelConfig):
    params = jax.jit(Decoder(c).init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), params)


def stored(case: str):
    with np.load(GOLDEN / f"qwen2_{case}.npz") as data:
        arrays = {k: data[k] for k in data}
    return str(arrays.pop("config")), arrays.pop("tokens"), arrays.pop("logits"), arrays


def written(folder, c=C, **changes):
    """A saved checkpoint whose single file then has `changes` made; None takes a tensor away."""
    hf.save(folder, drawn(c), c, **IDS)
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")
    return folder


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_that_transformers_gave(tmp_path, case, dtype):
    config, tokens, expected, weights = stored(case)
    (tmp_path / "config.json").write_text(config)
    save_file({k: v.astype(dtype) for k, v in weights.items()}, tmp_path / "model.safetensors")
    c = hf.read_config(tmp_path)
    np.testing.assert_allclose(logits(c, hf.load(tmp_path, c), tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_saved_names_and_tensors_are_those_of_transformers(tmp_path, case):
    config, _, _, weights = stored(case)
    (tmp_path / "config.json").write_text(config)
    save_file(weights, tmp_path / "model.safetensors")
    c = hf.read_config(tmp_path)
    hf.save(tmp_path / "again", hf.load(tmp_path, c), c, **IDS)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == weights.keys()
    for name, w in weights.items():
        np.testing.assert_array_equal(again[name], w.astype(np.float32), err_msg=name)


@pytest.mark.parametrize("c", [C, dataclasses.replace(C, tie_embeddings=False)], ids=["tied", "untied"])
@pytest.mark.parametrize("limit", [5e9, 12_000, 1], ids=["one", "some", "each"])
def test_saved_in_shards_and_read_back(tmp_path, c, limit):
    hf.save(tmp_path, drawn(c), c, max_shard_bytes=limit, **IDS)
    assert_same(hf.load(tmp_path, hf.read_config(tmp_path)), drawn(c))
    files = sorted(tmp_path.glob("*.safetensors"))
    if limit == 5e9:
        assert [f.name for f in files] == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {f.name for f in files}
        assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
        tensors = [load_file(f) for f in files]
        assert index["metadata"]["total_size"] == sum(x.nbytes for t in tensors for x in t.values())
        assert all(len(t) == 1 or sum(x.nbytes for x in t.values()) <= limit for t in tensors)
        assert len(files) == (len(index["weight_map"]) if limit == 1 else len(files)) > 1


def test_saving_over_another_layout_leaves_one_checkpoint(tmp_path):
    hf.save(tmp_path, jax.tree.map(np.zeros_like, drawn(C)), C, **IDS)
    hf.save(tmp_path, drawn(C), C, max_shard_bytes=12_000, **IDS)
    assert_same(hf.load(tmp_path, C), drawn(C))


@pytest.mark.parametrize("stored_as", ["bfloat16", "float16"])
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
def test_half_precision_files(tmp_path, stored_as, param_dtype):
    cast = jax.tree.map(lambda x: x.astype(stored_as), drawn(C))
    hf.save(tmp_path, cast, C, **IDS)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v.astype(stored_as) for k, v in tensors.items()}, tmp_path / "model.safetensors")
    c = dataclasses.replace(C, param_dtype=param_dtype)
    assert_same(hf.load(tmp_path, c), jax.tree.map(lambda x: x.astype(param_dtype), cast))


def test_bfloat16_parameters_are_saved_as_such(tmp_path):
    c = dataclasses.replace(C, param_dtype="bfloat16")
    hf.save(tmp_path, drawn(c), c, **IDS)
    assert {x.dtype.name for x in load_file(tmp_path / "model.safetensors").values()} == {"bfloat16"}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_same(hf.load(tmp_path, c), drawn(c))


def test_without_bias_zeros_are_written_and_nothing_else_is_read(tmp_path):
    c = dataclasses.replace(C, attention_bias=False)
    hf.save(tmp_path, drawn(c), c, **IDS)
    name = "model.layers.1.self_attn.k_proj.bias"
    tensors = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(tensors[name], np.zeros(24, np.float32))
    assert hf.read_config(tmp_path).attention_bias is False
    assert_same(hf.load(tmp_path, hf.read_config(tmp_path)), drawn(c))
    save_file(tensors | {name: np.ones(24, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} must be 0"):
        hf.load(tmp_path, c)


def test_a_tied_checkpoint_may_hold_its_head_besides(tmp_path):
    assert_same(hf.load(written(tmp_path, **{"lm_head.weight": np.zeros((31, 24), np.float32)}), C), drawn(C))


def test_all_that_misfits_is_told_at_once(tmp_path):
    folder = written(
        tmp_path,
        **{
            "model.norm.weight": None,
            "model.layers.2.mlp.up_proj.weight": np.zeros((40, 24), np.float32),
            "model.layers.0.self_attn.q_proj.weight": np.zeros((48, 23), np.float32),
            "model.layers.0.mlp.down_proj.weight": np.zeros((24, 40), np.int8),
        },
    )
    with pytest.raises(UserError) as error:
        hf.load(folder, C)
    text = str(error.value)
    assert "missing: model.norm.weight" in text
    assert "unexpected: model.layers.2.mlp.up_proj.weight" in text
    assert "model.layers.0.self_attn.q_proj.weight [48, 23] instead of [48, 24]" in text
    assert "not of a float type: model.layers.0.mlp.down_proj.weight I8" in text


def test_many_misfits_are_counted(tmp_path):
    with pytest.raises(UserError, match=r"missing: [^,]*, [^,]*, [^,]*, [^,]* and 8 more$"):
        hf.load(written(tmp_path), dataclasses.replace(C, layers=3))


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_file_cut_short_is_refused(tmp_path, kept):
    file = written(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file"):
        hf.load(tmp_path, C)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no weights, expected model\.safetensors or model\.safetensors\.index\.json"):
        hf.load(tmp_path, C)


def test_a_missing_shard_and_a_broken_index_are_refused(tmp_path):
    hf.save(tmp_path, drawn(C), C, max_shard_bytes=12_000, **IDS)
    (tmp_path / sorted(f.name for f in tmp_path.glob("*.safetensors"))[1]).unlink()
    with pytest.raises(UserError, match=r"names model-00002-of-\d+\.safetensors, which is not there"):
        hf.load(tmp_path, C)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(UserError, match="weight_map must map names to files"):
        hf.load(tmp_path, C)


def test_a_weight_without_a_name_is_not_dropped_in_silence(tmp_path):
    params = {**drawn(C), "lora": {"kernel": np.zeros((2, 2))}}
    with pytest.raises(ValueError, match="lora/kernel"):
        hf.save(tmp_path, params, C, **IDS)


LARGE = dataclasses.replace(C, vocab_size=65_536, layers=12, width=2048, heads=16, kv_heads=8, head_dim=128, mlp=5632)
MEASURE = """
import sys
from popo_jax.models import hf
c = hf.read_config(sys.argv[1])
params = hf.load(sys.argv[1], c)
import jax
size = sum(x.nbytes for x in jax.tree.leaves(params))
largest = max(x.nbytes // (len(x) if "layers" in str(path) else 1) for path, x in jax.tree.leaves_with_path(params))
peak = 1024 * next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))
print(size, largest, peak - size, float(params["norm"]["scale"].sum()))
"""


@pytest.mark.slow
def test_loading_needs_little_more_than_the_parameters(tmp_path):
    """Over the parameters' own bytes: one tensor and a fifth, the interpreter with jax (some 300 MB) counted in."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), jax.eval_shape(Decoder(LARGE).init, jax.random.key(0)))
    hf.save(tmp_path, params, LARGE, max_shard_bytes=5e8, **IDS)
    del params
    out = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, check=True).stdout
    size, largest, over, _ = map(float, out.split())
    print(f"parameters {size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, over {over / 1e6:.0f} MB")
    assert size > 2e9
    assert over < 1.2 * largest
