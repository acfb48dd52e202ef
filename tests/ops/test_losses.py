"""The decoupled surrogate by a hand-made table, its gradients and identities; weights and KL."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from popo_jax.ops.losses import (
    AGGREGATIONS,
    aggregate,
    decoupled_surrogate,
    k3,
    log_weights,
    ratios,
    sequence_behaviour,
    weights,
)

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
surrogate = functools.partial(decoupled_surrogate, **CLIP, weight_cap=2.0)

# r is below, inside, above the clip [0.8, 1.28], or far above; the weight pi_prox / pi_behav is below or above the cap of 2.
#  A    r    ratio   J       J, dual clip 3   dJ/dlogp  the same, dual clip 3
TABLE = [
    (+2, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5),  #       0.5 * min(1, 1.6)
    (+2, 1.1, 0.5, 1.1, 1.1, 1.1, 1.1),  #       0.5 * 2.2
    (+2, 1.5, 0.5, 1.28, 1.28, 0.0, 0.0),  #     0.5 * min(3, 2.56)
    (+2, 5.0, 0.5, 1.28, 1.28, 0.0, 0.0),  #     0.5 * min(10, 2.56); dual clip is not for A > 0
    (-2, 0.5, 0.5, -0.8, -0.8, 0.0, 0.0),  #     0.5 * min(-1, -1.6)
    (-2, 1.1, 0.5, -1.1, -1.1, -1.1, -1.1),  #   0.5 * -2.2
    (-2, 1.5, 0.5, -1.5, -1.5, -1.5, -1.5),  #   0.5 * min(-3, -2.56)
    (-2, 5.0, 0.5, -5.0, -3.0, -5.0, 0.0),  #    0.5 * min(-10, -2.56); 0.5 * max(-10, -6)
    (+2, 0.5, 3.0, 2.0, 2.0, 2.0, 2.0),  #       2 * 1
    (+2, 1.1, 3.0, 4.4, 4.4, 4.4, 4.4),  #       2 * 2.2
    (+2, 1.5, 3.0, 5.12, 5.12, 0.0, 0.0),  #     2 * 2.56
    (+2, 5.0, 3.0, 5.12, 5.12, 0.0, 0.0),  #     2 * 2.56
    (-2, 0.5, 3.0, -3.2, -3.2, 0.0, 0.0),  #     2 * -1.6
    (-2, 1.1, 3.0, -4.4, -4.4, -4.4, -4.4),  #   2 * -2.2
    (-2, 1.5, 3.0, -6.0, -6.0, -6.0, -6.0),  #   2 * -3
    (-2, 5.0, 3.0, -20.0, -12.0, -20.0, 0.0),  # 2 * -10; 2 * -6
    (0, 5.0, 3.0, 0.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize("A, r, ratio, J, J_dual, grad, grad_dual", TABLE)
def test_by_hand(A, r, ratio, J, J_dual, grad, grad_dual):
    prox = jnp.array([[-1.5]])
    logp, behav, mask = prox + math.log(r), prox - math.log(ratio), jnp.array([[True]])
    for advantages in (jnp.array([float(A)]), jnp.array([[float(A)]])):
        for dual, value, slope in ((None, J, grad), (3.0, J_dual, grad_dual)):
            f = functools.partial(surrogate, dual_clip=dual)
            got, pull = jax.vjp(lambda x, f=f, a=advantages: f(x, prox, behav, a, mask), logp)
            assert float(got[0, 0]) == pytest.approx(value, rel=1e-6, abs=1e-12)
            assert float(pull(jnp.ones((1, 1)))[0][0, 0]) == pytest.approx(slope, rel=1e-6, abs=1e-12)


def rows(seed: int = 0, B: int = 6, T: int = 9):
    """(logp, logp_prox, logp_behav, advantages [B], mask): ratios on both sides of every bound, holes in the mask."""
    rng = np.random.default_rng(seed)
    prox = rng.normal(-2, 1, (B, T))
    logp, behav = prox + rng.normal(0, 0.4, (B, T)), prox + rng.normal(0, 0.7, (B, T))
    mask = rng.random((B, T)) < 0.7
    mask[:, 0], mask[2] = False, False
    return *(jnp.asarray(x, jnp.float32) for x in (logp, prox, behav, rng.normal(0, 1, B))), jnp.asarray(mask)


def per_token(logp, prox, behav, A, mask, dual_clip=None, cap=2.0):
    """The objective a token at a time, in Python's own floats."""
    out = np.zeros(mask.shape)
    for b, t in np.argwhere(np.asarray(mask)):
        a, r = float(A[b]), math.exp(float(logp[b, t]) - float(prox[b, t]))
        w = math.exp(float(prox[b, t]) - float(behav[b, t]))
        clipped = min(max(r, 0.8), 1.28)
        J = min(r * a, clipped * a)
        if dual_clip is not None and a < 0 and dual_clip * a > J:
            J = dual_clip * a
        out[b, t] = min(w, cap) * J
    return out


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_whole_batches_agree_with_python(dual_clip):
    x = rows()
    got = surrogate(*x, dual_clip=dual_clip)
    np.testing.assert_allclose(got, per_token(*x, dual_clip), rtol=2e-6, atol=1e-7)
    assert (np.asarray(got)[~np.asarray(x[4])] == 0).all()
    assert not np.allclose(got, per_token(*x, None if dual_clip else 1.5), atol=1e-3)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_gradient_agrees_with_finite_differences(dual_clip):
    with jax.enable_x64(True):
        logp, prox, behav, A, mask = (x if x.dtype == bool else x.astype(jnp.float64) for x in rows())
        r = np.exp(np.asarray(logp - prox))
        assert min(np.abs(r - bound).min() for bound in (0.8, 1.28, 1.5)) > 1e-3  # away from kinks

        def f(x):
            return surrogate(x, prox, behav, A, mask, dual_clip=dual_clip)

        assert f(logp).dtype == jnp.float64
        check_grads(f, (logp,), order=1, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)
        check_grads(lambda x: k3(x, prox, mask), (logp,), order=1, modes=("rev",), atol=1e-6, rtol=1e-6)


def gradients(x, **kw):
    """Of the sum of J with respect to logp, logp_prox, logp_behav."""
    return jax.grad(lambda *p: jnp.sum(surrogate(*p, *x[3:], **kw)), argnums=(0, 1, 2))(*x[:3])


def test_no_gradient_reaches_the_proximal_and_the_behaviour_policy():
    x = rows()
    at_logp, at_prox, at_behav = gradients(x)
    assert np.abs(at_logp).max() > 0.1
    np.testing.assert_array_equal(at_prox, 0)
    np.testing.assert_array_equal(at_behav, 0)
    # weight 1 / 1.5 < cap, so a weight that leaked would have a gradient; with all three the same array, one leak shows
    same = jax.grad(lambda p: jnp.sum(surrogate(p, p, p - math.log(1.5), x[3], x[4])))(x[0])
    np.testing.assert_allclose(same, np.where(x[4], 1.5 * x[3][:, None], 0), rtol=1e-6)
    for f in (lambda p: ratios(x[0], p, x[4]), lambda p: weights(p, x[0], x[4]), lambda p: weights(x[0], p, x[4])):
        np.testing.assert_array_equal(jax.grad(lambda p, f=f: jnp.sum(f(p)))(x[1]), 0)
    for f in (lambda p: sequence_behaviour(p, x[2], x[4]), lambda p: k3(x[0], p, x[4])):
        np.testing.assert_array_equal(jax.grad(lambda p, f=f: jnp.sum(f(p)))(x[1]), 0)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_poison_where_masked_changes_neither_value_nor_gradient(poison):
    logp, prox, behav, A, mask = rows()
    A_BT = jnp.broadcast_to(A[:, None], mask.shape)
    clean = (logp, prox, behav, A_BT, mask)
    dirty = (*(jnp.where(mask, x, poison) for x in clean[:4]), mask)
    for kw in ({}, {"dual_clip": 1.5}):
        np.testing.assert_array_equal(surrogate(*dirty, **kw), surrogate(*clean, **kw))
        for a, b in zip(gradients(dirty, **kw), gradients(clean, **kw), strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(k3(dirty[0], dirty[1], mask), k3(logp, prox, mask))
    np.testing.assert_array_equal(sequence_behaviour(dirty[1], dirty[2], mask), sequence_behaviour(prox, behav, mask))
    grads = jax.grad(lambda x: jnp.sum(k3(x, dirty[1], mask)))(dirty[0])
    assert np.isfinite(grads).all() and np.abs(grads).max() > 0.1
    row_of_nan = jnp.where(jnp.any(mask, axis=1), A, poison)  # row 2 counts nothing
    np.testing.assert_array_equal(surrogate(logp, prox, behav, row_of_nan, mask), surrogate(*clean))


def test_fully_masked_rows_have_zero_value_and_gradient():
    x = rows()
    nothing = (*(jnp.full_like(a, jnp.nan) for a in x[:3]), x[3], jnp.zeros_like(x[4]))
    np.testing.assert_array_equal(surrogate(*nothing), 0)
    for grad in gradients(nothing):
        np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("at_logp", [-200.0, 0.0, 200.0])
@pytest.mark.parametrize("at_behav", [-200.0, 200.0])
def test_log_ratios_of_200_are_finite(dtype, at_logp, at_behav):
    shape = (2, 3)
    prox, A, mask = jnp.full(shape, -1.0, dtype), jnp.array([1.0, -1.0]), jnp.ones(shape, bool)
    x = (prox + jnp.asarray(at_logp, dtype), prox, prox + jnp.asarray(at_behav, dtype), A, mask)
    value = surrogate(*x)
    assert value.dtype == jnp.float32 and np.isfinite(value).all()
    assert all(np.isfinite(g.astype(jnp.float32)).all() for g in gradients(x))
    w = 2.0 if at_behav < 0 else math.exp(-20)
    r = {-200.0: (math.exp(-20), 0.8), 0.0: (1.0, 1.0), 200.0: (1.28, math.exp(20))}[at_logp]
    np.testing.assert_allclose(value, [[w * r[0]] * 3, [-w * r[1]] * 3], rtol=2e-6)
    d = k3(x[0], x[1], mask)
    bounded = -np.clip(at_logp, -20.0, 20.0)
    np.testing.assert_allclose(d, math.exp(bounded) - 1 - bounded, rtol=1e-6)


def test_bfloat16_is_read_in_float32():
    x = rows()
    low = tuple(a if a.dtype == bool else a.astype(jnp.bfloat16) for a in x)
    wide = tuple(a if a.dtype == bool else a.astype(jnp.float32) for a in low)
    np.testing.assert_array_equal(surrogate(*low), surrogate(*wide))


def test_on_policy_it_is_the_plain_advantage():
    logp, _, _, A, mask = rows()
    got = surrogate(logp, logp, logp, A, mask)
    np.testing.assert_array_equal(got, np.where(mask, A[:, None], 0))
    grad = gradients((logp, logp, logp, A, mask))[0]
    np.testing.assert_allclose(grad, np.where(mask, A[:, None], 0), rtol=1e-6)  # REINFORCE


def test_masked_equals_sliced():
    logp, prox, behav, A, _ = rows(T=9)
    mask = jnp.arange(9) < jnp.array([9, 4, 1, 7, 3, 5])[:, None]
    whole = surrogate(logp, prox, behav, A, mask)
    for b, n in enumerate([9, 4, 1]):
        row = tuple(x[b : b + 1, :n] for x in (logp, prox, behav))
        np.testing.assert_array_equal(whole[b, :n], surrogate(*row, A[b : b + 1], jnp.ones((1, n), bool))[0])


def test_ratios_and_weights_are_what_the_surrogate_uses():
    logp, prox, behav, A, mask = rows()
    m, r, w = np.asarray(mask), np.exp(np.asarray(logp - prox)), np.exp(np.asarray(prox - behav))
    np.testing.assert_allclose(ratios(logp, prox, mask), np.where(m, r, 1), rtol=1e-6)
    np.testing.assert_allclose(log_weights(prox, behav, mask), np.where(m, prox - behav, 0), rtol=1e-6)
    np.testing.assert_allclose(weights(prox, behav, mask), np.where(m, w, 1), rtol=1e-6)
    np.testing.assert_allclose(weights(prox, behav, mask, cap=2.0), np.where(m, np.minimum(w, 2), 1), rtol=1e-6)
    assert (w[m] > 2).any() and (w[m] < 2).any()
    whole = ratios(logp, prox, mask) * A[:, None]
    clipped = jnp.clip(ratios(logp, prox, mask), 0.8, 1.28) * A[:, None]
    by_parts = weights(prox, behav, mask, cap=2.0) * jnp.minimum(whole, clipped)
    np.testing.assert_array_equal(surrogate(logp, prox, behav, A, mask), jnp.where(mask, by_parts, 0))


def test_sequence_weights():
    """Row 0: ratios 1/2 and 3 make 3/2 on both tokens; row 1: sums beyond 20 are clipped; row 2: equal policies, weight 1."""
    prox = jnp.array([[-1.0, -2.0, 9.0], [-1.0, -2.0, -3.0], [-0.3, -1.7, -2.9], [-1.0, -1.0, -1.0]])
    behav = prox - jnp.log(jnp.array([[0.5, 3.0, 7.0], [1e6, 1e6, 1e-1], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]))
    mask = jnp.array([[True, True, False], [True, True, True], [True, True, True], [False, False, False]])
    out = sequence_behaviour(prox, behav, mask)
    want = [[math.log(1.5)] * 2 + [0], [20.0] * 3, [0.0] * 3, [0.0] * 3]
    np.testing.assert_allclose(log_weights(prox, out, mask), want, atol=1e-6)
    np.testing.assert_array_equal(out[2], prox[2])
    np.testing.assert_array_equal(np.asarray(out)[~np.asarray(mask)], 0)
    got = surrogate(prox, prox, out, jnp.ones(4), mask)
    np.testing.assert_allclose(got, [[1.5, 1.5, 0], [2.0] * 3, [1.0] * 3, [0.0] * 3], rtol=1e-6)


def test_k3_by_hand():
    ref, mask = jnp.array([[-1.0, -1.0, -1.0, -1.0]]), jnp.array([[True, True, True, False]])
    logp = ref + jnp.log(jnp.array([[1.0, 2.0, 0.5, 3.0]]))
    # d = -log 2: 1/2 - 1 + log 2; d = log 2: 2 - 1 - log 2
    np.testing.assert_allclose(k3(logp, ref, mask), [[0.0, 0.19314718, 0.30685282, 0.0]], atol=1e-7)
    grad = jax.grad(lambda x: jnp.sum(k3(x, ref, mask)))(logp)
    np.testing.assert_allclose(grad, [[0.0, 0.5, -1.0, 0.0]], atol=1e-6)  # 1 - exp(d)


def test_k3_of_close_policies_does_not_cancel():
    logp, ref, mask = jnp.zeros((1, 1)), jnp.full((1, 1), 1e-3), jnp.ones((1, 1), bool)
    assert float(k3(logp, ref, mask)[0, 0]) == pytest.approx(5.001667e-7, rel=1e-3)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_without_replay_it_is_trls_grpo(aggregation, kl):
    """Loss and gradient of TRL's loss types dapo, grpo and dr_grpo (trl/trainer/grpo_trainer.py), written in torch."""
    torch = pytest.importorskip("torch")
    logp, old, ref, A, mask = rows(7)
    mask = mask.at[2, 4].set(True)  # TRL's row mean counts every row
    theirs = torch.tensor(np.array(logp), requires_grad=True)
    m, adv = torch.tensor(np.array(mask)).float(), torch.tensor(np.array(A)).unsqueeze(1)
    coef_1 = torch.exp(theirs - torch.tensor(np.array(old)))
    coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.28)
    loss_BT = -torch.min(coef_1 * adv, coef_2 * adv)
    d = torch.tensor(np.array(ref)) - theirs
    loss_BT = loss_BT + kl * (torch.exp(d) - d - 1)
    loss = {
        "token": lambda: (loss_BT * m).sum() / m.sum(),
        "sequence": lambda: ((loss_BT * m).sum(-1) / m.sum(-1).clamp(min=1.0)).mean(),
        "dr_grpo": lambda: (loss_BT * m).sum() / (loss_BT.size(0) * 8),
    }[aggregation]()
    loss.backward()

    def ours(x):
        terms = -surrogate(x, old, old, A, mask) + kl * k3(x, ref, mask)
        return aggregate(terms, mask, aggregation=aggregation, response_limit=8)

    value, grad = jax.value_and_grad(ours)(logp)
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    np.testing.assert_allclose(grad, theirs.grad.numpy(), atol=1e-6, rtol=1e-5)
    assert np.abs(grad).max() > 1e-2


def test_bad_shapes_are_refused_when_traced():
    logp, prox, behav, A, mask = rows()

    def trace(*x):
        jax.eval_shape(surrogate, *x)

    with pytest.raises(ValueError, match=r"\[B, T\], got logp \(6, 9\), logp_prox \(6, 8\), mask \(6, 9\)"):
        trace(logp, prox[:, :8], behav, A, mask)
    with pytest.raises(ValueError, match=r"logp_behav \(6, 1\), mask \(6, 9\)"):
        trace(logp, prox, behav[:, :1], A, mask)
    with pytest.raises(ValueError, match=r"mask \(5, 9\)"):
        trace(logp, prox, behav, A, mask[:5])
    with pytest.raises(ValueError, match=r"\[B, T\], got logp \(9,\)"):
        trace(logp[0], prox[0], behav[0], A, mask[0])
    for bad in (A[:5], A[:, None], A[0], jnp.zeros(9)):
        with pytest.raises(ValueError, match=r"got advantages \(.*\), mask \(6, 9\)"):
            trace(logp, prox, behav, bad, mask)
    with pytest.raises(ValueError, match="a mask must be bool, got int32"):
        trace(logp, prox, behav, A, mask.astype(jnp.int32))
    with pytest.raises(ValueError, match="logp_ref"):
        k3(logp, prox[:2], mask)
