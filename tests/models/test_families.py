"""Every family against transformers: logits, padding on both sides, the cache, greedy tokens, and back."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popo_jax.config import Config
from popo_jax.models import hf
from popo_jax.models.decoder import Decoder, resolved
from popo_jax.runtime.mesh import make_mesh
from popo_jax.sampling.sampler import Decoding, Sampler

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
ODD = {"hidden_size": 28, "num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": 4}
WIDE_HEADS = {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8}
TIED = {"tie_word_embeddings": True}
CASES: dict[str, dict[str, Any]] = {
    "qwen2": {"rope_theta": 1e6},
    "qwen2-tied": TIED | {"rms_norm_eps": 1e-3},
    "qwen2-odd-yarn": ODD | {"rope_parameters": YARN},
    "qwen2-linear": {"rope_parameters": LINEAR},
    "qwen3": WIDE_HEADS,
    "qwen3-tied": TIED | {"head_dim": 8},
    "qwen3-biases": {"attention_bias": True, "head_dim": 6},
    "qwen3-odd-yarn": ODD | {"rope_parameters": YARN | {"attention_factor": 1.3}},
    "qwen3-linear": {"rope_parameters": LINEAR, "head_dim": 8},
    "llama": WIDE_HEADS | {"hidden_size": 20},
    "llama-tied-llama3": TIED | {"rope_parameters": LLAMA3},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-odd-linear": ODD | {"rope_parameters": LINEAR},
    "llama-yarn": {"rope_parameters": YARN | {"beta_fast": 2.0, "beta_slow": 0.5, "truncate": False, "factor": 8.0}},
    "mistral": {"sliding_window": None},
    "mistral-tied-window": TIED | {"sliding_window": 5},
    "mistral-odd-yarn": ODD | {"sliding_window": None, "rope_parameters": YARN | {"mscale": 2.0, "mscale_all_dim": 1.0}},
}
NAMES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}
V, T, PROMPT = 31, 17, 6


@functools.cache
def made(case: str) -> Any:
    """The case's model by transformers: random, norms and biases too, logits of order 1 to 10."""
    name = NAMES[case.split("-")[0]]
    size = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 44}
    ids = {"vocab_size": V, "num_hidden_layers": 3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**(size | ids | {"max_position_embeddings": 64} | CASES[case]))
    torch.manual_seed(sorted(CASES).index(case))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for path, p in model.named_parameters():
            scale = 0.5 if "embed" in path or "bias" in path else 1.5 * p.shape[-1] ** -0.5
            p.copy_(torch.randn_like(p) * scale + (1.0 if "norm" in path else 0.0))
    return model


def tokens(shape=(3, T)) -> np.ndarray:
    return np.random.default_rng(5).integers(3, V, shape).astype(np.int32)


def their_logits(model: Any, ids: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
    """[B, T, V]; keep [B, T]: what is not padding, positions counted from its first."""
    more = {}
    if keep is not None:
        positions = np.maximum(np.cumsum(keep, axis=1) - 1, 0)
        more = {"attention_mask": torch.from_numpy(keep).long(), "position_ids": torch.from_numpy(positions).long()}
    with torch.no_grad():
        return model(torch.from_numpy(ids).long(), **more).logits.numpy()


@pytest.fixture(params=CASES)
def loaded(request, tmp_path):
    """(their model, our decoder, our parameters, folder it was loaded from); every other case comes in shards."""
    theirs, sharded = made(request.param), list(CASES).index(request.param) % 2 == 0
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB" if sharded else "5GB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == sharded
    c = resolved(hf.read_config(tmp_path / "theirs"), "cpu")
    return theirs, Decoder(c), hf.load(tmp_path / "theirs", c), tmp_path / "theirs"


def test_logits_padded_on_the_right(loaded):
    theirs, model, params, _ = loaded
    ids, keep = tokens(), np.arange(T) < np.array([[T], [9], [13]])
    ours = jax.jit(model.logits)(params, ids)
    np.testing.assert_allclose(ours, their_logits(theirs, ids), atol=1e-4, rtol=0)
    padded = jax.jit(model.logits)(params, np.where(keep, ids, 0))
    expected = their_logits(theirs, np.where(keep, ids, 0), keep)
    np.testing.assert_allclose(padded[keep], expected[keep], atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 1


def test_the_cache_and_padding_on_the_left(loaded):
    theirs, model, params, _ = loaded
    ids, lengths = tokens(), np.array([PROMPT, 2, 4])
    keep = np.arange(T) >= (PROMPT - lengths)[:, None]
    expected = their_logits(theirs, np.where(keep, ids, 0), keep)
    weights, start = model.for_decode(params), jnp.asarray(PROMPT - lengths)
    logits, cache = jax.jit(model.prefill, static_argnums=3)(weights, np.where(keep, ids, 0)[:, :PROMPT], start, T)
    step = jax.jit(model.decode)
    for t in range(PROMPT, T):
        np.testing.assert_allclose(logits, expected[:, t - 1], atol=1e-4, rtol=0, err_msg=f"slot {t - 1}")
        logits, cache = step(weights, cache, ids[:, t], jnp.int32(t), start)
    np.testing.assert_allclose(logits, expected[:, -1], atol=1e-4, rtol=0)


def test_saved_back_it_is_theirs_again(loaded, tmp_path):
    theirs, model, params, folder = loaded
    hf.save(tmp_path / "ours", params, model.c, eos_ids=(2,), pad_id=0, bos_id=1, max_shard_bytes=10_000)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(again) is type(theirs)
    assert not any(info.values()), info
    np.testing.assert_array_equal(their_logits(again, tokens()), their_logits(theirs, tokens()))
    assert hf.read_config(tmp_path / "ours") == hf.read_config(folder)
    ids = torch.from_numpy(tokens((3, PROMPT))).long()
    theirs_next = again.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[:, PROMPT:]
    c = Decoding(1, 0.0, None, 1.0, PROMPT, 8, 4, None, (2,))
    ours = Sampler(model, c, make_mesh(Config()))(params, list(tokens((3, PROMPT))), jax.random.key(0), version=0)
    np.testing.assert_array_equal(np.where(ours.sampled_mask, ours.tokens, 0)[:, : theirs_next.shape[1]], theirs_next)
