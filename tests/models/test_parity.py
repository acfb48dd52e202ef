"""What is made here, opened by transformers; test_families has the other way."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from popo_jax.model_config import ModelConfig
from popo_jax.models import hf
from popo_jax.models.decoder import Decoder, resolved
from tests.golden.make_qwen2 import logits, model, tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IDS = {"eos_ids": (2, 3), "pad_id": 0}


@functools.partial(jax.jit, static_argnums=0)
def ours(c: ModelConfig, params, ids):
    return Decoder(resolved(c, "cpu")).logits(params, ids)


def test_the_stored_logits_are_these(case="untied"):
    from tests.models.test_hf import stored

    np.testing.assert_allclose(logits(model(case), tokens()), stored(case)[2], atol=1e-5)


@pytest.mark.parametrize(
    "c", [ModelConfig(vocab_size=31), ModelConfig(vocab_size=31, attention_bias=False, tie_embeddings=False)]
)
def test_a_fresh_policy_opens_in_transformers(tmp_path, c):
    params = jax.jit(Decoder(resolved(c, "cpu")).init)(jax.random.key(0))
    hf.save(tmp_path, jax.tree.map(lambda x: x * 4, params), c, **IDS)
    there, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    expected = ours(c, hf.load(tmp_path, c), tokens())
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(there.eval(), tokens()), expected, atol=1e-4, rtol=0)
    ids = torch.from_numpy(tokens()).long()
    greedy = there.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)[:, -1]  # ids may equal pad_id
    np.testing.assert_array_equal(greedy, expected[:, -1].argmax(-1))


def test_bfloat16_parameters_open_as_bfloat16(tmp_path):
    c = ModelConfig(vocab_size=31, param_dtype="bfloat16")
    hf.save(tmp_path, jax.jit(Decoder(resolved(c, "cpu")).init)(jax.random.key(0)), c, **IDS)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
