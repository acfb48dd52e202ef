"""Alignment, log-probs, entropies, and the sampler's filters against transformers'."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from popo_jax.ops.logprobs import filtered_logits, logprobs_and_entropy, next_token_logprobs

B, T, V = 3, 5, 11


def some(seed: int = 0, scale: float = 3.0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(0, scale, (B, T, V)), jnp.float32), jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)


def test_by_hand():
    """Logits log(1, 2, 5) before token 1: log-prob log 2/8; at temperature 1/2 the odds are 1 : 4 : 25."""
    logits = jnp.log(jnp.array([[[1.0, 2.0, 5.0], [9.0, 1.0, 1.0]]]))
    tokens = jnp.array([[2, 1]])
    logp, entropy = logprobs_and_entropy(logits, tokens, temperature=1.0)
    np.testing.assert_allclose(logp, [[0.0, -1.3862944]], atol=1e-6)
    np.testing.assert_allclose(entropy, [[0.0, 0.9002561]], atol=1e-6)  # 3 log 2 - (2 log 2 + 5 log 5) / 8
    np.testing.assert_allclose(next_token_logprobs(logits, tokens, temperature=0.5), [[0.0, -2.0149030]], atol=1e-6)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_each_position_speaks_of_its_own_token(temperature):
    logits, tokens = some()
    logp, entropy = logprobs_and_entropy(logits, tokens, temperature=temperature)
    assert logp.shape == entropy.shape == (B, T) and logp.dtype == entropy.dtype == jnp.float32
    np.testing.assert_array_equal(logp, next_token_logprobs(logits, tokens, temperature=temperature))
    np.testing.assert_array_equal(logp[:, 0], 0)
    np.testing.assert_array_equal(entropy[:, 0], 0)
    for b in range(B):
        for t in range(1, T):
            z = np.asarray(logits[b, t - 1], np.float64) / temperature
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            assert float(logp[b, t]) == pytest.approx(np.log(p[tokens[b, t]]), abs=3e-6)
            assert float(entropy[b, t]) == pytest.approx(-(p * np.log(p)).sum(), abs=3e-6)


def test_the_last_logits_speak_of_nothing():
    logits, tokens = some()
    dirty = logits.at[:, -1].set(jnp.nan)

    def total(x):
        return sum(jnp.sum(part) for part in logprobs_and_entropy(x, tokens, temperature=0.7))

    assert total(dirty) == total(logits)
    grads = jax.grad(total)(dirty)
    np.testing.assert_array_equal(grads[:, -1], 0)
    assert np.isfinite(grads).all() and np.abs(grads[:, :-1]).max() > 0.1


def test_far_off_logits_lose_no_precision():
    """A common offset cancels: entropies taken as logsumexp(z) - E[z] of the raw logits would be off by 1e-3 here."""
    logits, tokens = some()
    logits = jnp.round(logits * 64) / 64  # the offset then adds without rounding
    near, far = (logprobs_and_entropy(x, tokens, temperature=1.0) for x in (logits, logits + 8192.0))
    np.testing.assert_allclose(near, far, atol=1e-6)


@pytest.mark.parametrize("dtype, tol", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-6)])
def test_low_precision_logits_are_read_in_float32(dtype, tol):
    logits, tokens = some()
    logits = logits.astype(dtype)
    got = next_token_logprobs(logits, tokens, temperature=0.7)
    want = jax.nn.log_softmax(logits.astype(jnp.float32) / 0.7)
    want = jnp.take_along_axis(want[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(got[:, 1:], want, atol=tol, rtol=1e-6)


def test_a_vocabulary_padded_with_minus_infinity():
    logits, tokens = some()
    tokens = tokens % 7
    padded = logits.at[..., 7:].set(-jnp.inf)
    got = logprobs_and_entropy(padded, tokens, temperature=0.7)
    np.testing.assert_allclose(got, logprobs_and_entropy(logits[..., :7], tokens, temperature=0.7), atol=1e-6)
    grads = jax.grad(lambda x: sum(jnp.sum(part) for part in logprobs_and_entropy(x, tokens, temperature=0.7)))(padded)
    assert np.isfinite(grads).all()
    np.testing.assert_array_equal(grads[..., 7:], 0)
    assert next_token_logprobs(padded, tokens.at[0, 1].set(9), temperature=1.0)[0, 1] == -jnp.inf


def test_gradients_agree_with_finite_differences():
    with jax.enable_x64(True):
        logits, tokens = some(1, 1.0)
        logits = logits.astype(jnp.float64)
        weights = jnp.asarray(np.random.default_rng(2).normal(size=(2, B, T)))

        def f(x):
            logp, entropy = logprobs_and_entropy(x, tokens, temperature=0.7)
            return jnp.sum(logp * weights[0] + entropy * weights[1])

        check_grads(f, (logits,), order=1, modes=("rev",), atol=1e-3, rtol=1e-3)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"got \(3, 5, 11\) and \(3, 4\)"):
        jax.eval_shape(lambda x, y: next_token_logprobs(x, y, temperature=1.0), *(some()[0], some()[1][:, :4]))


def kept(logits, **kw) -> np.ndarray:
    return np.isfinite(np.asarray(filtered_logits(jnp.asarray(logits, jnp.float32), **({"temperature": 1.0} | kw))))


# probabilities 0.5, 0.25, 0.15, 0.1
ROW = np.log([[0.15, 0.5, 0.1, 0.25]])


@pytest.mark.parametrize(
    "kw, expected",
    [
        ({}, [1, 1, 1, 1]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 3}, [1, 1, 0, 1]),
        ({"top_k": 4}, [1, 1, 1, 1]),
        ({"top_k": 100}, [1, 1, 1, 1]),
        ({"top_p": 1.0}, [1, 1, 1, 1]),
        ({"top_p": 1e-6}, [0, 1, 0, 0]),
        ({"top_p": 0.49}, [0, 1, 0, 0]),
        ({"top_p": 0.51}, [0, 1, 0, 1]),
        ({"top_p": 0.74}, [0, 1, 0, 1]),
        ({"top_p": 0.76}, [1, 1, 0, 1]),
        ({"top_p": 0.91}, [1, 1, 1, 1]),
        ({"top_k": 2, "top_p": 0.66}, [0, 1, 0, 0]),  # top-k first: 2/3 and 1/3 are left
        ({"top_k": 2, "top_p": 0.67}, [0, 1, 0, 1]),
        ({"temperature": 0.5, "top_p": 0.72}, [0, 1, 0, 0]),  # temperature first: 50 : 12.5 : 4.5 : 2 of 69
        ({"temperature": 0.5, "top_p": 0.73}, [0, 1, 0, 1]),
    ],
)
def test_filters_by_hand(kw, expected):
    np.testing.assert_array_equal(kept(ROW, **kw), [np.array(expected, bool)])


def test_what_is_kept_is_only_scaled():
    got = filtered_logits(jnp.asarray(ROW, jnp.bfloat16), temperature=0.5, top_k=2)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[0, [1, 3]], np.asarray(jnp.asarray(ROW, jnp.bfloat16), np.float32)[0, [1, 3]] * 2)


def test_equal_logits_give_the_smallest_set_lowest_index_first():
    np.testing.assert_array_equal(kept(np.zeros((1, 8)), top_p=0.3), [[True] * 3 + [False] * 5])
    np.testing.assert_array_equal(kept([[0.0, 3.0, 0.0, 3.0]], top_p=0.6), [[False, True, False, True]])
    np.testing.assert_array_equal(kept([[0.0, 3.0, 0.0, 3.0]], top_p=0.96), [[True, True, False, True]])


@pytest.mark.parametrize("temperature, k, p", [(1.0, None, 0.9), (0.6, 20, 1.0), (1.5, 50, 0.8), (0.7, 5, 0.3), (1.0, 1, 0.5)])
def test_filters_are_transformers(temperature, k, p):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    logits = np.random.default_rng(3).normal(0, 2, (16, 101)).astype(np.float32)
    x = theirs.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits)) if temperature != 1 else torch.tensor(logits)
    x = theirs.TopKLogitsWarper(k)(None, x) if k else x
    x = theirs.TopPLogitsWarper(p)(None, x) if p < 1 else x
    got = filtered_logits(jnp.asarray(logits), temperature=temperature, top_k=k, top_p=p)
    np.testing.assert_allclose(got, x.numpy(), rtol=1e-6)
    assert 0 < np.isinf(x.numpy()).mean() < 1
