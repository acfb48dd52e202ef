from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popo_jax.model_config import ModelConfig
from popo_jax.models.decoder import Decoder
from popo_jax.ops.logprobs import logprobs_and_entropy

C = ModelConfig(vocab_size=23, layers=2, width=24, heads=6, kv_heads=3, head_dim=8, mlp=40, linear="plain", attention="xla")
UNTIED = dataclasses.replace(C, tie_embeddings=False, attention_bias=False, kv_heads=1, linear="barrier")
B, T = 4, 11


@functools.partial(jax.jit, static_argnums=0)
def init(c: ModelConfig, seed: int = 0):
    return Decoder(c).init(jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=0)
def logits(c: ModelConfig, params, tokens):
    return Decoder(c).logits(params, tokens)


@functools.partial(jax.jit, static_argnums=(0, 4))
def prefill(c: ModelConfig, weights, tokens, start, capacity):
    return Decoder(c).prefill(weights, tokens, start, capacity)


@functools.partial(jax.jit, static_argnums=0)
def decode(c: ModelConfig, weights, cache, token, slot, start):
    return Decoder(c).decode(weights, cache, token, slot, start)


@functools.cache
def params_of(c: ModelConfig):
    """Larger than init's, biases and scales random too: differences show."""
    params = init(dataclasses.replace(c, linear="plain", dtype="float32", remat="none"))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    noise = [rng.normal(scale=0.3, size=x.shape).astype(x.dtype) for x in leaves]
    return jax.tree.map(np.add, params, jax.tree.unflatten(tree, noise))


@functools.cache
def weights_of(c: ModelConfig):
    return jax.jit(Decoder(c).for_decode)(params_of(c))


@functools.cache
def tokens_of(shape=(B, T)):
    return jax.random.randint(jax.random.key(2), shape, 0, C.vocab_size)


def loss(c: ModelConfig):
    tokens = tokens_of()

    def of(params):
        logp = jax.nn.log_softmax(Decoder(c).logits(params, tokens)[:, :-1])
        return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1).mean()

    return of


@functools.cache
def gradient(c: ModelConfig):
    return jax.jit(jax.grad(loss(c)))(params_of(c))


def by_path(tree):
    return {jax.tree_util.keystr(path): np.asarray(x, np.float32) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def assert_close(a, b, atol):
    a, b = by_path(a), by_path(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], atol=atol, err_msg=path)


def test_parameters_are_one_plain_dict_with_blocks_on_axis_0():
    params = init(C)
    shapes = {"/".join(k.key for k in path): x.shape for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}
    assert type(params) is dict
    assert shapes == {
        "embed/embedding": (23, 24),
        "layers/attn/k/bias": (2, 24),
        "layers/attn/k/kernel": (2, 24, 24),
        "layers/attn/o/kernel": (2, 48, 24),
        "layers/attn/q/bias": (2, 48),
        "layers/attn/q/kernel": (2, 24, 48),
        "layers/attn/v/bias": (2, 24),
        "layers/attn/v/kernel": (2, 24, 24),
        "layers/attn_norm/scale": (2, 24),
        "layers/mlp/down/kernel": (2, 40, 24),
        "layers/mlp/gate/kernel": (2, 24, 40),
        "layers/mlp/up/kernel": (2, 24, 40),
        "layers/mlp_norm/scale": (2, 24),
        "norm/scale": (24,),
    }
    assert init(UNTIED)["head"]["kernel"].shape == (24, 23)
    assert "bias" not in init(UNTIED)["layers"]["attn"]["q"]


def test_init_draws_each_weight_anew_with_deviation_002():
    wide = dataclasses.replace(C, width=128, mlp=128)
    params = init(wide)
    gate, up = (np.asarray(params["layers"]["mlp"][k]["kernel"]) for k in ("gate", "up"))
    for w in (gate, np.asarray(params["embed"]["embedding"])):
        np.testing.assert_allclose(w.std(), 0.02, rtol=0.05)
    assert not np.allclose(gate[0], gate[1])
    assert not np.allclose(gate, up)
    assert not np.allclose(gate, init(wide, 1)["layers"]["mlp"]["gate"]["kernel"])


def test_later_tokens_and_other_rows_change_nothing_before():
    params, tokens = params_of(C), tokens_of()
    before = logits(C, params, tokens)
    changed = tokens.at[:, 6:].set(0).at[1].set(3)
    after = logits(C, params, changed)
    np.testing.assert_allclose(after[0, :6], before[0, :6], atol=1e-6)
    assert np.abs(after[0, 6:] - before[0, 6:]).max() > 0.1


@pytest.mark.parametrize(("linear", "remat"), [("barrier", "dots"), ("barrier", "full")])
def test_rematerialized_gradients_equal_the_plain_ones(linear, remat):
    c = dataclasses.replace(C, linear=linear)
    assert_close(gradient(dataclasses.replace(c, remat=remat)), gradient(c), 1e-6)


def test_remat_computes_again_what_it_says():
    """In the backward pass: nothing; attention's two products; all of a block's products."""

    def products(remat):
        c = dataclasses.replace(C, remat=remat, layers=1)
        return str(jax.make_jaxpr(jax.grad(loss(c)))(params_of(c))).count("dot_general[")

    none, dots, full = (products(remat) for remat in ("none", "dots", "full"))
    block = 9  # q k v o gate up down, and scores and weighted values
    assert none < dots < full <= none + block
    assert dots <= none + 2


def mixture(c: ModelConfig, **more):
    """A function of params: log-probs and entropies, mixed."""
    a, b = np.random.default_rng(3).normal(size=(2, B, T)).astype(np.float32)

    def of(params):
        logp, entropy = Decoder(c, **more).logprobs(params, tokens_of(), temperature=0.7)
        return jnp.sum(a * logp + b * entropy), (logp, entropy)

    return of


@pytest.mark.parametrize("c", [C, UNTIED])
def test_log_probs_are_those_of_the_logits_whatever_the_chunk(c):
    params = params_of(c)
    grads, values = jax.jit(jax.grad(mixture(c), has_aux=True))(params)
    want = logprobs_and_entropy(logits(c, params, tokens_of()), tokens_of(), temperature=0.7)
    for chunk in (3, 100):
        got, values = jax.jit(jax.grad(mixture(dataclasses.replace(c, head_chunk=chunk)), has_aux=True))(params)
        np.testing.assert_allclose(values, want, atol=3e-6)
        assert_close(got, grads, 1e-5 * max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads)))


def test_few_logits_are_all_there_at_once_in_the_program_of_old():
    model, how = Decoder(C), {"temperature": 0.7}
    new = jax.make_jaxpr(lambda p, t: model.logprobs(p, t, **how))
    old = jax.make_jaxpr(lambda p, t: logprobs_and_entropy(model.logits(p, t), t, **how))
    args = params_of(C), tokens_of()
    assert str(new(*args)) == str(old(*args)) and f"[{B},{T},{C.vocab_size}]" in str(new(*args))


def test_every_shard_of_the_rows_sums_its_part_of_the_heads_gradient():
    def program(row_shards):
        c = dataclasses.replace(C, head_chunk=3)
        return str(jax.make_jaxpr(jax.grad(mixture(c, row_shards=row_shards), has_aux=True))(params_of(C)))

    for n, sizes in ((1, "f32[1,24,23]"), (2, "f32[2,24,23]"), (6, "f32[2,24,23]")):  # 4 rows: 6 shards share them as 2 would
        assert sizes in program(n)


def test_barrier_gradients_equal_the_plain_ones():
    assert_close(gradient(dataclasses.replace(C, linear="barrier")), gradient(C), 1e-6)


@pytest.mark.parametrize("c", [C, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("starts", [(0, 0, 0, 0), (0, 2, 4, 5), (5, 5, 1, 3)])
def test_prefill_and_cached_decode_equal_the_full_forward(c, starts):
    """Prompts right-aligned in S = 6 slots; row b's tokens are the row without its padding."""
    S, new, start = 6, 5, jnp.array(starts)
    params, tokens = params_of(c), tokens_of((B, S + new))
    weights = weights_of(c)
    last, cache = prefill(c, weights, tokens[:, :S], start, S + new + 3)
    got = [last]
    for t in range(S, S + new):
        last, cache = decode(c, weights, cache, tokens[:, t], t, start)
        got.append(last)
    for b in range(B):
        alone = jnp.roll(tokens[b], -starts[b])[None]  # right-padded: what follows a row changes nothing
        full = logits(c, params, alone)[0, S - starts[b] - 1 : S + new - starts[b]]
        np.testing.assert_allclose(np.stack(got, 1)[b], full, atol=1e-5)


def test_what_lies_in_the_padding_changes_nothing():
    weights = weights_of(C)
    tokens, start = tokens_of((B, 6)), jnp.array([0, 2, 4, 5])
    padding = jnp.arange(6) < start[:, None]
    one, _ = prefill(C, weights, tokens, start, 8)
    other, _ = prefill(C, weights, jnp.where(padding, 1, tokens), start, 8)
    np.testing.assert_array_equal(one, other)


def test_greedy_over_the_cache_equals_greedy_by_full_forward_passes():
    S, new, start = 5, 8, jnp.array([0, 1, 3, 4])
    params, prompts = params_of(C), tokens_of((B, S))
    weights = weights_of(C)
    last, cache = prefill(C, weights, prompts, start, S + new)
    cached = []
    for t in range(S, S + new):
        cached.append(last.argmax(-1))
        last, cache = decode(C, weights, cache, cached[-1], t, start)
    rows = np.zeros((B, S + new), np.int32)
    length = S - np.asarray(start)
    for b in range(B):
        rows[b, : length[b]] = prompts[b, start[b] :]
    for t in range(new):
        rows[np.arange(B), length + t] = np.asarray(logits(C, params, rows))[np.arange(B), length + t - 1].argmax(-1)
        np.testing.assert_array_equal(rows[np.arange(B), length + t], cached[t])
    assert len(np.unique(rows)) > 5


def test_a_cache_is_one_array_per_layer_head_major():
    _, cache = prefill(C, weights_of(C), tokens_of((B, 6)), jnp.zeros(B, jnp.int32), 9)
    assert [[x.shape for x in layer] for layer in cache] == [[(B, 3, 8, 9), (B, 3, 9, 8)]] * 2


def test_bfloat16_is_near_float32_and_logits_stay_float32():
    half = dataclasses.replace(C, dtype="bfloat16")
    params, tokens = params_of(C), tokens_of()
    full, near = (logits(c, params, tokens) for c in (C, half))
    assert near.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(near - full).mean()) < 0.02 * float(full.std())
    grads = by_path(gradient(half))
    plain = by_path(gradient(C))
    for path, g in grads.items():
        assert np.linalg.norm(g - plain[path]) < 0.1 * np.linalg.norm(plain[path]), path
    weights = weights_of(half)
    last, cache = prefill(half, weights, tokens, jnp.zeros(B, jnp.int32), T)
    assert {x.dtype for x in jax.tree.leaves((weights, cache))} == {jnp.dtype("bfloat16")}
    assert float(jnp.abs(last - near[:, -1]).mean()) < 0.02 * float(full.std())


def test_bfloat16_parameters():
    params = init(dataclasses.replace(C, param_dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("bad", [{"vocab_size": None}, {"linear": "auto"}, {"attention": "auto"}])
def test_an_unresolved_config_is_refused(bad):
    with pytest.raises(ValueError, match="resolve linear and attention first"):
        Decoder(dataclasses.replace(C, **bad))


def test_a_weight_of_another_shape_is_refused_at_trace_time():
    params = jax.tree.map(lambda x: x, params_of(C))
    params["layers"]["attn"]["q"]["kernel"] = jnp.zeros((2, 24, 40))
    with pytest.raises(Exception, match=r"48.*40|40.*48"):
        Decoder(C).logits(params, tokens_of())


def test_head_of_hidden_is_logits():
    params, tokens = params_of(C), tokens_of()
    whole = jax.jit(lambda params: Decoder(C).head(params, Decoder(C).hidden(params, tokens)))(params)
    np.testing.assert_allclose(whole, logits(C, params, tokens), atol=1e-6)


def test_equal_configs_share_one_compilation():
    traces = []

    def forward(params, tokens, model):
        traces.append(model)
        return model.logits(params, tokens)

    jitted = jax.jit(forward, static_argnums=2)
    for _ in range(2):
        jitted(params_of(C), tokens_of(), Decoder(dataclasses.replace(C)))
    assert len(traces) == 1
