from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from popo_jax.models import lora
from popo_jax.models.decoder import Decoder
from popo_jax.rl import micro, update
from popo_jax.rl.optim import learning_rate
from popo_jax.rl.state import Batch, TrainState
from tests import tiny

G, P, T = 4, 4, 30


def batch(seed: int = 0, *, replayed: tuple[int, ...] = (), masked: tuple[int, ...] = ()) -> Batch:
    """Random rows: prompts of 5, responses of 1 to 8; `replayed` slots carry stored log-probs, `masked` slots nothing."""
    rng = np.random.default_rng(seed)
    B, position, slot = P * G, np.arange(T), np.repeat(np.arange(P), G)
    ends = 5 + rng.integers(1, 9, B)
    sampled = (position >= 5) & (position < ends[:, None])
    tokens = np.where(position < ends[:, None], rng.integers(3, 90, (B, T)), 0).astype(np.int32)
    fresh = ~np.isin(slot, replayed)
    behav = np.where(sampled & ~fresh[:, None], rng.normal(-5.0, 1.0, (B, T)), 0).astype(np.float32)
    return Batch(
        tokens=jnp.asarray(tokens),
        sampled_mask=jnp.asarray(sampled),
        token_mask=jnp.asarray(sampled & ~np.isin(slot, masked)[:, None]),
        logp_behav=jnp.asarray(behav),
        logp_sampler=jnp.zeros((B, T)),
        adv=jnp.asarray(rng.normal(size=B), jnp.float32),
        fresh=jnp.asarray(fresh),
        version=jnp.where(jnp.asarray(fresh), 0, -1),
    )


@functools.cache
def _setup(**kw):
    c = tiny.config(model__layers=1, **kw)
    b = tiny.built(c)
    keep = jax.jit(functools.partial(update.train_step, model=b.model, tx=b.tx, c=b.c))
    whole = functools.partial(update.gradient, model=b.model, c=b.c)
    gradient = jax.jit(lambda params, *rest: whole(params, {}, *rest))
    return c, dataclasses.replace(b, train_step=keep), tiny.state(b), gradient


def setup(**kw):
    """(config, trainer whose step does not donate, state), compiled once per config."""
    return _setup(**kw)[:3]


def step(b, state: TrainState, x: Batch):
    return b.train_step(state, x)


def assert_close(a, b, tol: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tol, rtol=0), a, b)


def reference_gradient(b, params, x: Batch, logp_old):
    """GRPO / DAPO's token-mean objective with decoupled weights, a token at a time, in plain Python."""
    c = b.c

    def loss(params):
        logp_BT = jax.nn.log_softmax(b.model.logits(params, x.tokens) / c.sample.temperature)
        total, count = 0.0, 0
        for i, t in np.argwhere(np.asarray(x.token_mask)):
            logp = logp_BT[i, t - 1, x.tokens[i, t]]
            old = jax.lax.stop_gradient(logp) if logp_old is None else logp_old[i, t]
            w = 1.0 if fresh[i] else jnp.minimum(jnp.exp(jax.lax.stop_gradient(old) - x.logp_behav[i, t]), c.weight.cap)
            r, A = jnp.exp(logp - old), x.adv[i]
            total += w * jnp.minimum(r * A, jnp.clip(r, 1 - c.loss.clip_low, 1 + c.loss.clip_high) * A)
            count += 1
        return -total / count

    fresh = np.asarray(x.fresh)
    return jax.grad(loss)(params)


def test_gradient_is_the_decoupled_objectives():
    _c, b, state = setup()
    x = batch(replayed=(1,), masked=(3,))
    got, _, _ = _setup()[3](state.params, x, None, state.step)
    want = reference_gradient(b, state.params, x, None)
    assert optax.global_norm(want) > 1e-2
    assert_close(got, want, 2e-6)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "dr_grpo"])
def test_micro_batches_equal_the_whole(aggregation):
    x = batch(replayed=(2,))
    state = setup()[2]
    kw = {"loss__aggregation": aggregation, "loss__entropy_coef": 0.01}
    got = [_setup(**kw, **more)[3](state.params, x, None, state.step) for more in ({}, {"batch__micro_batch": 4})]
    assert_close(got[0][0], got[1][0], 1e-5)
    assert_close(got[0][2], got[1][2], 1e-5)
    assert got[0][1]["loss"] == pytest.approx(float(got[1][1]["loss"]), abs=1e-6)


@pytest.mark.parametrize("tie", [True, False])
def test_a_chunked_head_takes_the_same_step(tie):
    """With an entropy bonus, replayed rows and a first pass for two mini-batches; 7 does not divide the 29 positions.

    Adam's first steps are the signs of the gradient, whatever its size: a larger eps keeps rounding from showing in them.
    """
    x, kw = batch(replayed=(1,), masked=(2,)), {"model__tie_embeddings": tie, "loss__entropy_coef": 0.01, "optim__eps": 1e-3}
    kw["batch__mini_batches"] = 2
    _, whole, state = setup(**kw)
    _, part, same = setup(**kw, model__head_chunk=7)
    assert_close(state.params, same.params, 0)
    vocab = whole.model.c.vocab_size
    assert f"f32[8,{T},{vocab}]" not in (text := str(jax.make_jaxpr(part.train_step)(state, x))) and f"[8,7,{vocab}]" in text
    (a, out_a), (b, out_b) = step(whole, state, x), step(part, state, x)
    np.testing.assert_allclose(out_a.logp_start, out_b.logp_start, atol=1e-5)
    moved = max(float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (a.params, state.params)), strict=True))
    assert moved > 1e-2
    assert_close(a.params, b.params, 1e-3 * moved)
    for key in ("loss", "entropy", "grad_norm"):
        assert float(out_a.metrics[key]) == pytest.approx(float(out_b.metrics[key]), rel=1e-4), key


def test_mini_batches_are_optimizer_steps_on_slots_in_strides():
    c, b, state = setup(batch__mini_batches=2)
    x = batch(replayed=(1,))
    new, out = step(b, state, x)
    prox = b.score(state.params, x.tokens)
    np.testing.assert_allclose(out.logp_start, np.where(x.sampled_mask, prox, 0), atol=1e-6)
    params, opt_state, rate = state.params, state.opt_state, learning_rate(c.optim, c.steps)(0)
    for m in range(2):
        rows = np.flatnonzero(np.repeat(np.arange(P), G) % 2 == m)
        mini = jax.tree.map(lambda a, rows=rows: a[rows], x)
        grads, _, _ = _setup(batch__mini_batches=2)[3](params, mini, prox[rows], state.step)
        direction, opt_state = b.tx.update(grads, opt_state, params, key=jax.random.key(0))
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
    assert_close(new.params, params, 2e-5)
    assert int(new.step) == 1


def test_split_and_join_are_inverse_and_keep_groups_whole():
    x = jnp.arange(P * G)
    minis = micro.split_slots(x, 2, G)
    np.testing.assert_array_equal(minis[1], [4, 5, 6, 7, 12, 13, 14, 15])
    np.testing.assert_array_equal(micro.join_slots(minis, G), x)
    np.testing.assert_array_equal(micro.join_rows(micro.split_rows(x, 4)), x)


def test_log_probs_at_the_start_are_of_the_entry_parameters():
    x = batch()
    for M in (1, 2):
        _, b, state = setup(batch__mini_batches=M)
        _, out = step(b, state, x)
        np.testing.assert_allclose(out.logp_start, np.where(x.sampled_mask, b.score(state.params, x.tokens), 0), atol=1e-6)
        assert out.logp_start.dtype == jnp.float32


def test_an_empty_mini_batch_moves_nothing():
    """AdamW would move parameters on zero gradients (momentum, decay): the mini-batch must not be applied at all."""
    _, b, state = setup(batch__mini_batches=2, optim__weight_decay=0.1)
    warm, _ = step(b, state, batch())
    both, out = step(b, warm, batch(masked=(0, 1, 2, 3)))
    assert float(out.metrics["update/skipped"]) == 2 and np.isnan(out.metrics["entropy"])
    assert_close((both.params, both.opt_state), (warm.params, warm.opt_state), 0)
    half, out = step(b, warm, batch(masked=(1, 3)))
    assert float(out.metrics["update/skipped"]) == 1 and float(out.metrics["update_norm"]) > 0
    assert any(jax.tree.leaves(jax.tree.map(lambda a, c: bool((a != c).any()), half.params, warm.params)))


def test_a_loss_that_is_not_finite_is_not_applied():
    _, b, state = setup()
    x = batch()
    new, out = step(b, state, x._replace(adv=x.adv.at[3].set(jnp.inf)))
    assert float(out.metrics["update/nonfinite"]) == 1
    assert_close(new.params, state.params, 0)
    assert int(new.step) == 1


def test_poison_where_nothing_is_counted_changes_nothing():
    _, b, state = setup(loss__entropy_coef=0.01)
    x = batch(replayed=(1,), masked=(2,))
    dirty = jnp.where(x.token_mask, x.logp_behav, jnp.nan)
    assert_close(step(b, state, x)[0].params, step(b, state, x._replace(logp_behav=dirty))[0].params, 0)


def test_replayed_rows_are_weighed_and_fresh_rows_are_not():
    _, b, state = setup()
    x = batch(replayed=(1, 3))
    _, out = step(b, state, x)
    m = {k: float(v) for k, v in out.metrics.items()}
    rows = np.repeat([False, True, False, True], G)
    counted = np.asarray(x.token_mask) & rows[:, None]
    w = np.exp(np.asarray(out.logp_start) - np.asarray(x.logp_behav))[counted]
    assert m["weight/mean"] == pytest.approx(np.minimum(w, 2.0).mean(), rel=1e-4)
    assert m["weight/max"] == pytest.approx(w.max(), rel=1e-4)
    assert m["weight/ess"] == pytest.approx(w.sum() ** 2 / (len(w) * (w**2).sum()), rel=1e-4)
    assert m["weight/capped"] == pytest.approx((w > 2).mean(), rel=1e-4) and m["weight/capped"] > 0
    assert m["clip/low_replayed"] == m["clip/high_replayed"] == m["kl/proximal"] == 0  # r = 1 in the first mini-batch
    all_fresh = step(b, state, batch())[1].metrics
    assert np.isnan(all_fresh["weight/mean"]) and np.isnan(all_fresh["weight/ess"])


def test_mismatch_is_of_rows_that_these_parameters_sampled():
    _, b, state = setup()
    x = batch(replayed=(1,))
    logp = np.asarray(step(b, state, x)[1].logp_start)
    own = np.asarray(x.sampled_mask) & (np.asarray(x.version) == 0)[:, None]
    off = np.where(own, logp + 0.25, 99.0).astype(np.float32)
    m = step(b, state, x._replace(logp_sampler=jnp.asarray(off)))[1].metrics
    assert float(m["mismatch/mean"]) == pytest.approx(0.25, abs=1e-4)
    assert float(m["mismatch/max"]) == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize("M", [1, 2])
def test_behaviour_preset_clips_around_the_behaviour_policy(M):
    _, b, state = setup(algorithm__name="popo-behav", batch__mini_batches=M)
    x = batch(replayed=(0, 1, 2, 3))
    m = step(b, state, x)[1].metrics
    logp = b.score(state.params, x.tokens)
    r = np.exp(np.asarray(logp - x.logp_behav))
    A, mask = np.asarray(x.adv)[:, None], np.asarray(x.token_mask)
    if M == 1:
        assert float(m["clip/high_replayed"]) == pytest.approx(((r > 1.28) & (A > 0))[mask].mean(), abs=1e-6)
        assert float(m["clip/low_replayed"]) == pytest.approx(((r < 0.8) & (A < 0))[mask].mean(), abs=1e-6)
    assert float(m["clip/high_replayed"]) > 0 and float(m["weight/mean"]) == 1


def test_all_presets_but_one_lower_to_the_same_text():
    x, texts = batch(), {}
    for name in ("grpo", "grpo-filter", "dapo", "popo", "popo-ineff", "popo-stale", "popo-pi-old", "popo-kl", "popo-behav"):
        _, b, state = setup(algorithm__name=name)
        texts[name] = tiny.built(b.c).train_step.lower(state, x).as_text()
    same = {texts[n] for n in texts if n != "popo-behav"}
    assert len(same) == 1 and texts["popo-behav"] not in same


def test_sequence_weights_and_sampler_correction_reach_the_loss():
    x = batch(replayed=(1,))
    plain = step(*setup()[1:], x)[0].params
    for kw in ({"weight__level": "sequence"}, {"weight__correct_sampler": True}):
        _, b, state = setup(**kw)
        other = step(b, state, x)[0].params
        assert max(jax.tree.leaves(jax.tree.map(lambda a, c: float(abs(a - c).max()), plain, other))) > 1e-4


def test_kl_to_a_reference_pulls_back():
    """With no advantage the KL term alone moves parameters, and its gradient is 0 at the reference."""
    _, b, state = setup(loss__kl_coef=0.5)
    x = batch()._replace(adv=jnp.zeros(P * G))
    here = b.score(state.params, x.tokens)
    at_home = step(b, state, x._replace(logp_ref=here))[1].metrics
    away = step(b, state, x._replace(logp_ref=here - 0.3))[1].metrics
    assert float(at_home["grad_norm"]) < 1e-5 < 1e-2 < float(away["grad_norm"])
    d = -0.3
    assert float(away["loss"]) == pytest.approx(0.5 * (np.exp(d) - 1 - d), rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_finite_at_extreme_ratios(dtype):
    _, b, state = setup(model__dtype=dtype, batch__mini_batches=2)
    for shift in (-200.0, 200.0):
        x = batch(replayed=(0, 1, 2, 3))
        x = x._replace(logp_behav=jnp.where(x.sampled_mask, shift, 0.0))
        new, out = step(b, state, x)
        assert float(out.metrics["update/nonfinite"]) == 0
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(new.params))


def test_learning_rate_schedules():
    c = tiny.config(steps=10, optim__learning_rate=1.0, optim__warmup_steps=3, optim__schedule="linear").optim
    rates = [float(learning_rate(c, 10)(i)) for i in range(11)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[10] == pytest.approx(0.0) and sorted(rates[3:], reverse=True) == rates[3:]
    flat = tiny.config(optim__learning_rate=1.0).optim
    assert [float(learning_rate(flat, 10)(i)) for i in (0, 9)] == [1.0, 1.0]


def test_all_in_bfloat16_small_steps_are_not_lost():
    """Weights, computation and moments in bfloat16, micro-batches summed in float32: the step is float32's on average.

    At 1e-5 most weights are too large for rounding to the nearest to see the step.
    """
    low = {"model__dtype": "bfloat16", "model__param_dtype": "bfloat16", "optim__state_dtype": "bfloat16"}
    moved = {}
    for rate, kw in ((1e-2, {}), (1e-5, low | {"batch__micro_batch": 4, "optim__learning_rate": 1e-5})):
        _, b, own = setup(**kw)
        same = jax.tree.map(lambda x, y: x.astype(y.dtype), setup()[2].params, own.params)
        state = b.state(jax.tree.map(jnp.array, same))
        new, out = step(b, state, batch())
        pairs = zip(jax.tree.leaves(new.params), jax.tree.leaves(same), strict=True)
        moved[rate] = np.concatenate([np.ravel(x.astype(jnp.float32) - y.astype(jnp.float32)) / rate for x, y in pairs])
        assert float(out.metrics["grad_norm"]) > 0 and np.isfinite(moved[rate]).all()
    assert np.mean(moved[1e-5] != 0) < 0.5  # by chance, not all at once
    assert np.sum(moved[1e-2] * moved[1e-5]) / np.sum(moved[1e-2] ** 2) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("minis", [1, 2])
def test_with_lora_only_the_adapters_move(minis):
    """The frozen weights stay to the bit, the optimizer keeps moments of the adapters alone, the merged model says the same."""
    b = tiny.built(tiny.config(model__lora={"rank": 2, "targets": ["q", "down"]}, batch__mini_batches=minis))
    before = jax.tree.map(np.asarray, tiny.state(b))
    trained, frozen = lora.split(before.params, b.model.c)
    assert len(jax.tree.leaves(trained)) == 4
    moments = [x.shape for x in jax.tree.leaves(before.opt_state) if x.ndim]
    assert sorted(moments) == sorted(2 * [x.shape for x in jax.tree.leaves(trained)])
    after, out = b.train_step(tiny.state(b), batch())
    assert out.metrics["grad_norm"] > 0
    moved, still = lora.split(after.params, b.model.c)
    jax.tree.map(np.testing.assert_array_equal, still, frozen)
    assert np.abs(moved["layers"]["attn"]["q"]["lora_b"]).max() > 0
    merged = Decoder(lora.without(b.model.c))
    tokens = batch().tokens
    np.testing.assert_allclose(
        b.model.logits(after.params, tokens), merged.logits(lora.merge(after.params, b.model.c), tokens), atol=1e-4
    )
