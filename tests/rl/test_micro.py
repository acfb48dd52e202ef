"""Micro-batches cut to their rows' lengths, those without anything to count left out: same step, less work."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popo_jax.data.arrange import arrange, put_back
from popo_jax.rl import micro
from popo_jax.rl.state import Batch
from tests import tiny
from tests.rl import test_update
from tests.rl.test_update import assert_close, setup

LENGTHS = {"batch__micro_batch": 4, "batch__length_buckets": 3}
"""T = 30 in lengths of 16, 24 and 30, four rows at a time."""


def batch(**kw) -> Batch:
    """Responses of 1 to 25 tokens after prompts of 5."""
    x, rng = test_update.batch(**kw), np.random.default_rng(7)
    B, T = x.tokens.shape
    ends = 5 + np.clip(np.exp(rng.normal(1.5, 0.8, B)), 1, 25).astype(int)
    ends[2] = 30
    t, sampled = np.arange(T), (np.arange(T) >= 5) & (np.arange(T) < ends[:, None])
    tokens = np.where(t < ends[:, None], rng.integers(3, 90, (B, T)), 0).astype(np.int32)
    kept = np.asarray(x.token_mask).any(axis=1)
    behav = np.where(sampled & ~np.asarray(x.fresh)[:, None], rng.normal(-5.0, 1.0, (B, T)), 0).astype(np.float32)
    return x._replace(tokens=tokens, sampled_mask=sampled, token_mask=sampled & kept[:, None], logp_behav=behav)


def arranged(x: Batch, c) -> tuple[Batch, np.ndarray]:
    fields, order = arrange({k: np.asarray(v) for k, v in x._asdict().items() if v is not None}, c)
    return Batch(**fields), order


@pytest.mark.parametrize(("aggregation", "M"), [("token", 2), ("sequence", 1)])
def test_the_step_is_the_same_with_padding_left_out(aggregation, M):
    kw = {"loss__aggregation": aggregation, "loss__entropy_coef": 0.01, "optim__eps": 1e-3, "batch__mini_batches": M}
    _, whole, state = setup(**kw)
    c, cut, _ = setup(**kw, **LENGTHS)
    x = batch(replayed=(1,), masked=(2,))
    y, order = arranged(x, c)
    assert {-1, 2} < set(np.ravel(y.bucket)) and not np.array_equal(order, np.arange(len(order)))
    (a, out_a), (b, out_b) = whole.train_step(state, x), cut.train_step(state, y)
    assert_close(a.params, b.params, 2e-5)
    assert_close(out_a.logp_start, put_back(np.asarray(out_b.logp_start), order), 1e-5)
    for key, value in out_a.metrics.items():
        assert float(out_b.metrics[key]) == pytest.approx(float(value), rel=2e-4, abs=1e-6, nan_ok=True), key


def test_only_what_has_to_be_is_computed():
    """Poison beyond a micro-batch's length and in rows without weight reaches nothing, and `one` is asked for the rest alone."""
    c = tiny.config(**LENGTHS)
    y, _ = arranged(batch(masked=(2,)), c)
    asked = micro.over_micro_batches(
        lambda tokens: (jnp.float32(tokens.shape[1]), tokens.astype(jnp.float32)),
        jnp.float32(0),
        jnp.add,
        jnp.asarray(y.tokens),
        jnp.asarray(y.bucket[0]),
        c=c,
    )
    lengths = [c.lengths[i] for i in y.bucket[0] if i >= 0]
    assert float(asked[0]) == sum(lengths) < 4 * 30
    want = np.zeros(y.tokens.shape)
    for j, t in enumerate(lengths):
        want[j::4, :t] = y.tokens[j::4, :t]
    np.testing.assert_array_equal(asked[1], want)


def test_nothing_to_count_is_an_empty_sum():
    c = tiny.config(**LENGTHS)
    out = micro.over_micro_batches(
        lambda x: (jnp.float32(1), x), jnp.float32(0), jnp.add, jnp.ones((16, 30)), jnp.full(4, -1, jnp.int32), c=c
    )
    assert float(out[0]) == 0 and not np.asarray(out[1]).any()


def test_without_buckets_all_is_computed_whole():
    c = tiny.config(**LENGTHS)
    out = micro.over_micro_batches(lambda x: (jnp.sum(x), x), jnp.float32(0), jnp.add, jnp.ones((16, 30)), None, c=c)
    assert float(out[0]) == 16 * 30 and np.asarray(out[1]).all()


def test_one_program_serves_all_lengths():
    c, b, state = setup(**LENGTHS)
    step = jax.jit(b.train_step)
    for kw in ({}, {"masked": (0, 1, 2, 3)}, {"masked": (1, 3)}):
        step(state, arranged(batch(**kw), c)[0])
    assert step._cache_size() == 1
