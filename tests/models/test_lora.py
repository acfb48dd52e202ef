"""LoRA: the merged model, what is trained and what is not, and adapters in peft."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from popo_jax.model_config import LoraConfig, ModelConfig
from popo_jax.models import hf, lora, peft
from popo_jax.models.decoder import Decoder

BASE = ModelConfig(
    vocab_size=31, layers=2, width=24, heads=6, kv_heads=3, head_dim=8, mlp=40, family="qwen3", linear="plain", attention="xla"
)
C = dataclasses.replace(BASE, lora=LoraConfig(rank=3, alpha=12.0, targets=("q", "v", "o", "down")))
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 9)).astype(np.int32)


def drawn(c: ModelConfig = C):
    params = jax.jit(Decoder(c).init)(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape) * 0.3, params)


def logits(c: ModelConfig, params):
    return jax.jit(Decoder(c).logits)(params, TOKENS)


def test_adapters_are_where_they_were_asked_for_and_do_nothing_at_first():
    params = jax.jit(Decoder(C).init)(jax.random.key(0))
    trained, frozen = lora.split(params, C)
    layers = {"/".join(path[1:-1]) for path in flatten_dict(trained)}
    assert layers == {"attn/q", "attn/v", "attn/o", "mlp/down"}
    assert trained["layers"]["attn"]["q"]["lora_a"].shape == (2, 24, 3)
    assert trained["layers"]["attn"]["v"]["lora_b"].shape == (2, 3, 24)
    assert np.abs(trained["layers"]["attn"]["q"]["lora_a"]).min() > 0
    np.testing.assert_array_equal(logits(C, params), logits(BASE, frozen))
    jax.tree.map(np.testing.assert_array_equal, lora.join(trained, frozen), params)


def test_logits_equal_those_of_the_merged_model_and_of_the_cache():
    params = drawn()
    merged = lora.merge(params, C)
    assert jax.tree.structure(merged) == jax.tree.structure(lora.split(params, C)[1])
    ours = logits(C, params)
    assert np.abs(ours - logits(BASE, lora.split(params, C)[1])).max() > 0.1
    np.testing.assert_allclose(ours, logits(BASE, merged), atol=1e-5)
    weights = Decoder(C).for_decode(params)
    last, cache = Decoder(C).prefill(weights, TOKENS[:, :4], jnp.zeros(2, jnp.int32), 9)
    np.testing.assert_allclose(last, ours[:, 3], atol=1e-5)
    for t in range(4, 9):
        last, cache = Decoder(C).decode(weights, cache, TOKENS[:, t], jnp.int32(t), jnp.zeros(2, jnp.int32))
        np.testing.assert_allclose(last, ours[:, t], atol=1e-5)


def test_merged_by_hand():
    params, q = drawn(), ("layers", "attn", "q")
    before, after = (flatten_dict(x) for x in (params, lora.merge(params, C)))
    for layer in range(2):
        a, b = (np.asarray(before[(*q, n)][layer], np.float64) for n in lora.ADAPTER)
        want = np.asarray(before[(*q, "kernel")][layer]) + 12.0 / 3 * a @ b
        np.testing.assert_allclose(after[(*q, "kernel")][layer], want, atol=1e-6)
    np.testing.assert_array_equal(after[("layers", "attn", "k", "kernel")], before[("layers", "attn", "k", "kernel")])


def test_without_lora_everything_is_trained():
    params = drawn(BASE)
    assert lora.split(params, BASE) == (params, {})
    assert lora.merge(params, BASE) is lora.join(params, {}) is params


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_an_adapter_opens_in_peft(tmp_path, family):
    theirs, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    import transformers

    every = LoraConfig(rank=4, alpha=6.0)
    c = dataclasses.replace(C, family=family, lora=every, attention_bias=family != "mistral", tie_embeddings=family != "llama")
    params = drawn(c)
    hf.save(tmp_path / "base", lora.split(params, c)[1], lora.without(c), eos_ids=(2,), pad_id=0)
    peft.save(tmp_path / "adapter", params, c, base=str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        plain = base(torch.from_numpy(TOKENS).long()).logits.numpy()
        adapted = theirs.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        found = adapted(torch.from_numpy(TOKENS).long()).logits.numpy()
    lacking = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert len(lacking) == 2 * 2 * 7
    np.testing.assert_allclose(found, logits(c, params), atol=1e-4, rtol=0)
    assert np.abs(found - plain).max() > 0.1
