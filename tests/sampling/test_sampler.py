from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popo_jax.sampling import sampler as sampling
from popo_jax.sampling.sampler import Sampler, right_align, smaller_bucket, split_groups
from popo_jax.types import Responses
from tests import tiny

KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def built():
    return tiny.built(tiny.config(sample__max_response_tokens=11, sample__chunk=4))


@pytest.fixture(scope="module")
def params(built):
    return tiny.sharp(built.fresh_params(jax.random.key(1)))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 90, n).astype(np.int32) for n in (5, 9, 3, 14, 7, 7)]


def make(built, *, samples=4, temperature=1.0, **kw) -> Sampler:
    s = built.sampler(samples=samples, temperature=temperature)
    return dataclasses.replace(s, c=dataclasses.replace(s.c, **kw))


def rows_of(prompts, r: Responses, samples: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T] in row layout and, for each row, where its response begins."""
    n = np.repeat([len(p) for p in prompts], samples)
    tokens = np.zeros((len(n), T), np.int32)
    for i, row in enumerate(r.tokens):
        tokens[i, : n[i]] = prompts[i // samples]
        tokens[i, n[i] : n[i] + len(row)] = row
    return tokens, n


def assert_same(a: Responses, b: Responses) -> None:
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.sampled_mask, b.sampled_mask)
    np.testing.assert_array_equal(a.ended, b.ended)
    np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probs_equal_the_trainers(prompts, temperature):
    """The sampler's log-probs and those the train step takes agree to 1e-5, at each temperature."""
    b = tiny.built(tiny.config(sample__max_response_tokens=11, sample__temperature=temperature))
    params = tiny.sharp(b.fresh_params(jax.random.key(1)))
    r = make(b, temperature=temperature)(params, prompts, KEY, version=0)
    tokens, n = rows_of(prompts, r, 4, b.c.row_tokens)
    trainer = np.asarray(b.score(params, tokens))
    at = np.minimum(n[:, None] + np.arange(11), b.c.row_tokens - 1)
    expected = np.take_along_axis(trainer, at, axis=1)
    assert r.sampled_mask.any(axis=1).all() and np.abs(r.logp[r.sampled_mask]).max() > 0.1
    np.testing.assert_allclose(r.logp[r.sampled_mask], expected[r.sampled_mask], atol=1e-5)


def test_greedy_equals_repeated_full_forward(built, params, prompts):
    r = make(built, samples=1, temperature=0.0, eos_ids=())(params, prompts, KEY, version=0)
    assert r.sampled_mask.all() and not r.ended.any() and (r.logp == 0).all()
    forward = jax.jit(built.model.logits)
    for prompt, got in zip(prompts, r.tokens, strict=True):
        row = np.zeros((1, built.c.row_tokens), np.int32)
        row[0, : len(prompt)] = prompt
        for t in range(11):
            row[0, len(prompt) + t] = np.argmax(forward(params, row)[0, len(prompt) + t - 1])
        np.testing.assert_array_equal(got, row[0, len(prompt) : len(prompt) + 11])


def ends(built, params, prompts) -> tuple[int, ...]:
    """Two frequent tokens as end tokens, so that rows end at many different places."""
    r = make(built, eos_ids=())(params, prompts, KEY, version=0)
    return tuple(int(i) for i in np.argsort(-np.bincount(r.tokens.ravel()))[:2])


@pytest.mark.parametrize("kw", [{"max_rows": 8}, {"max_rows": 4}, {"chunk": 1}, {"chunk": 3}, {"chunk": 64}])
def test_waves_chunks_and_compaction_change_no_draw(built, params, prompts, kw, monkeypatch):
    eos = ends(built, params, prompts)
    monkeypatch.setattr(sampling, "SMALLEST_BUCKET", 10**6)  # no compaction
    whole = make(built, eos_ids=eos, max_rows=None)(params, prompts, KEY, version=0)
    monkeypatch.setattr(sampling, "SMALLEST_BUCKET", 1)
    taken = []
    real = sampling._take
    monkeypatch.setattr(sampling, "_take", lambda rows, kept, mesh: taken.append(len(kept)) or real(rows, kept, mesh=mesh))
    assert_same(make(built, eos_ids=eos, **kw)(params, prompts, KEY, version=0), whole)
    lengths = whole.sampled_mask.sum(axis=1)
    assert len(set(lengths)) > 3 and lengths.min() < 4 and lengths.max() == 11
    assert taken or kw.get("chunk") not in (1, 3)  # with small chunks rows were dropped on the way


def test_dropping_rows_gives_a_layers_old_cache_back_before_the_next_is_made(built, monkeypatch):
    rows = sampling.Rows(tuple((jnp.arange(4.0) + i, jnp.arange(4.0) * i) for i in range(3)), *(jnp.arange(4) for _ in range(4)))
    alive, real = [], sampling._take
    old = rows.cache

    def take(tree, kept, mesh):
        alive.append(sum(not x.is_deleted() for layer in old for x in layer))
        return real(tree, kept, mesh=mesh)

    monkeypatch.setattr(sampling, "_take", take)
    new = sampling._compacted(rows, np.array([3, 1]), built.mesh)
    assert alive == [6, 6, 4, 2] and all(x.is_deleted() for layer in old for x in layer)
    np.testing.assert_array_equal(new.row, [3, 1])
    for i, (k, v) in enumerate(new.cache):
        np.testing.assert_array_equal(k, np.array([3.0, 1.0]) + i)
        np.testing.assert_array_equal(v, np.array([3.0, 1.0]) * i)


def test_several_end_tokens_are_sampled_and_counted(built, params, prompts):
    eos = ends(built, params, prompts)
    r = make(built, eos_ids=eos)(params, prompts, KEY, version=3)
    assert r.version == 3
    seen = set()
    for tokens, mask, ended in zip(r.tokens, r.sampled_mask, r.ended, strict=True):
        n = int(mask.sum())
        assert mask[:n].all() and (tokens[n:] == 0).all() and not np.isin(tokens[: n - 1], eos).any()
        assert ended == (tokens[n - 1] in eos) and (ended or n == 11)
        seen |= {int(tokens[n - 1])} & set(eos)
    assert seen == set(eos)


def test_every_row_and_step_has_its_own_key(built, params, prompts):
    one = [prompts[0]] * 3
    r = make(built, eos_ids=())(params, one, KEY, version=0)
    assert len({row.tobytes() for row in r.tokens}) == len(r.tokens)
    flat = make(built, eos_ids=())(jax.tree.map(jnp.zeros_like, params), one, KEY, version=0)  # all tokens alike
    assert min(len(set(row)) for row in flat.tokens) > 5
    other = make(built, eos_ids=())(params, one, jax.random.key(8), version=0)
    assert (r.tokens != other.tokens).any(axis=1).mean() > 0.9


def test_draws_follow_the_distribution(built, params, prompts):
    """4096 first tokens of one prompt against the full forward's probabilities, at a temperature."""
    r = make(built, samples=4096, temperature=0.8, max_response=1, eos_ids=())(params, prompts[:1], KEY, version=0)
    row = np.zeros((1, built.c.row_tokens), np.int32)
    row[0, : len(prompts[0])] = prompts[0]
    p = np.asarray(jax.nn.softmax(built.model.logits(params, row)[0, len(prompts[0]) - 1] / 0.8))
    counts = np.bincount(r.tokens[:, 0], minlength=len(p))
    big = p * 4096 >= 5
    chi2 = ((counts - p * 4096) ** 2 / (p * 4096))[big].sum()
    assert big.sum() > 5 and chi2 < big.sum() + 5 * np.sqrt(2 * big.sum())


def test_top_k_and_top_p_log_probs_are_of_what_was_sampled(built, params, prompts):
    r = make(built, samples=64, max_response=1, top_k=3, top_p=0.9, eos_ids=())(params, prompts[:1], KEY, version=0)
    chosen = {int(t): float(p) for t, p in zip(r.tokens[:, 0], np.exp(r.logp[:, 0]), strict=True)}
    assert 1 < len(chosen) <= 3
    assert sum(chosen.values()) == pytest.approx(1.0, abs=1e-5)


def test_second_call_of_a_shape_compiles_nothing(built, params, prompts):
    sample = make(built)
    sample(params, prompts, KEY, version=0)
    before = [f._cache_size() for f in (sampling._prefill, sampling._decode, sampling._for_decode)]
    shorter = [p[:3] for p in prompts]
    sample(params, shorter, jax.random.key(9), version=1)
    assert [f._cache_size() for f in (sampling._prefill, sampling._decode, sampling._for_decode)] == before


def test_prompt_over_the_limit_is_refused(built, params):
    with pytest.raises(ValueError, match=r"25 tokens.*24"):
        make(built)(params, [np.ones(25, np.int32)], KEY, version=0)


def test_right_align():
    tokens, start = right_align([np.array([1, 2]), np.array([3])], 3, 5)
    np.testing.assert_array_equal(tokens, [[0, 0, 0, 1, 2], [0, 0, 0, 0, 3], [0, 0, 0, 1, 2]])
    np.testing.assert_array_equal(start, [3, 4, 3])


@pytest.mark.parametrize(
    ("rows", "active", "bucket"),
    [
        (256, 193, 256),
        (256, 192, 192),
        (256, 129, 192),
        (256, 128, 128),
        (256, 96, 96),
        (256, 1, 8),
        (24, 5, 9),
        (24, 13, 18),
        (9, 1, 9),
        (4, 1, 4),
    ],
)
def test_smaller_bucket(rows, active, bucket):
    assert smaller_bucket(rows, active) == bucket


@pytest.mark.parametrize(
    ("prompts", "samples", "shards", "parts", "units"),
    [
        (16, 8, 1, 1, 16),
        (16, 8, 4, 1, 16),
        (16, 8, 64, 4, 64),  # two rows of a prompt on each shard
        (1, 8, 4, 4, 4),
        (6, 4, 4, 2, 12),
        (3, 1, 2, 1, 4),  # a row that only fills the shape
        (5, 3, 2, 1, 6),
    ],
)
def test_split_groups(prompts, samples, shards, parts, units):
    assert split_groups(prompts, samples, shards) == (parts, units)


def test_bfloat16_sampler_runs():
    b = tiny.built(tiny.config(model__dtype="bfloat16"))
    params = tiny.sharp(b.fresh_params(jax.random.key(1)))
    r = b.rollout_sampler()(params, [np.arange(3, 9, dtype=np.int32)], KEY, version=0)
    assert np.isfinite(r.logp).all() and jnp.asarray(r.logp).dtype == jnp.float32


@pytest.mark.parametrize("first", [1, 2])
def test_a_call_for_later_prompts_draws_what_they_have_among_all(built, params, prompts, first):
    eos = ends(built, params, prompts)
    whole = make(built, eos_ids=eos, max_rows=None)(params, prompts, KEY, version=0)
    part = make(built, eos_ids=eos, max_rows=4)(params, prompts[first:], KEY, version=0, first=first)
    rows = first * (len(whole.tokens) // len(prompts))
    np.testing.assert_array_equal(part.tokens, whole.tokens[rows:])
    np.testing.assert_allclose(part.logp, whole.logp[rows:], atol=1e-5)
