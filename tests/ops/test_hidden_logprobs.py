"""Log-probs straight from hidden states: the plain path's values and gradients, its memory, and what devices exchange."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from popo_jax.ops.hidden_logprobs import LOGITS, auto_chunk, hidden_logprobs
from popo_jax.ops.logprobs import logprobs_and_entropy

B, T, D, V = 4, 8, 6, 11
QWEN = 151936


def some(dtype=jnp.float32, *, axis: int = 1, scale: float = 1.0):
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(B, T, D)) * scale, rng.normal(size=(D, V))
    tokens = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    return jnp.asarray(hidden, dtype), jnp.asarray(weight if axis else weight.T, dtype), tokens


def plain(hidden, weight, tokens, *, temperature, axis=1, **_):
    w = (weight if axis else weight.T).astype(hidden.dtype)
    logits = jnp.dot(hidden, w, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return logprobs_and_entropy(logits, tokens, temperature=temperature)


def chunked(hidden, weight, tokens, *, temperature, axis=1, **how):
    return hidden_logprobs(hidden, weight, tokens, temperature=temperature, vocab_axis=axis, **how)


def pulled(f, hidden, weight, tokens, *, pull=(1.0, 1.0), **how):
    """(log-probs, entropies), and the gradients of a random mixture of both: `pull` scales the log-probs' and the entropies'."""
    a, b = np.random.default_rng(1).normal(size=(2, *tokens.shape)).astype(np.float32)

    def loss(hidden, weight):
        logp, entropy = f(hidden, weight, tokens, **how)
        return jnp.sum(pull[0] * a * logp + pull[1] * b * entropy), (logp, entropy)

    grads, values = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden, weight)
    return values, grads


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 8, 100])
@pytest.mark.parametrize(("axis", "temperature"), [(1, 1.0), (0, 0.6)])
def test_values_and_gradients_are_the_plain_ones(chunk, axis, temperature):
    """T - 1 = 7 positions speak: chunks of 1 and 7 divide them, the last of the others overlaps, 8 and 100 are larger."""
    args, how = some(axis=axis), {"temperature": temperature, "axis": axis}
    values, grads = pulled(chunked, *args, chunk=chunk, **how)
    want_values, want_grads = pulled(plain, *args, **how)
    assert all(x.dtype == jnp.float32 and x.shape == (B, T) for x in values)
    np.testing.assert_array_equal(np.asarray(values)[:, :, 0], 0)
    np.testing.assert_allclose(values, want_values, atol=2e-6)
    for got, want in zip(grads, want_grads, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype and np.abs(want).max() > 0.5
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("pull", [(1.0, 0.0), (0.0, 1.0)])
def test_each_of_the_two_has_its_own_gradient(pull):
    got, want = (pulled(f, *some(), temperature=0.7, chunk=3, pull=pull)[1] for f in (chunked, plain))
    for x, y in zip(got, want, strict=True):
        assert np.abs(y).max() > 0.1
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("row_shards", [2, 4])
def test_parts_of_the_weights_gradient_meet_in_their_sum(row_shards):
    got, want = (pulled(chunked, *some(), temperature=0.7, chunk=3, row_shards=n)[1] for n in (row_shards, 1))
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)


def test_gradients_agree_with_finite_differences():
    with jax.enable_x64(True):
        hidden, weight, tokens = some(jnp.float64)
        a, b = np.random.default_rng(2).normal(size=(2, B, T))

        def f(hidden, weight):
            logp, entropy = hidden_logprobs(hidden, weight, tokens, temperature=0.7, chunk=3)
            return jnp.sum(a * logp + b * entropy)

        check_grads(f, (hidden, weight), order=1, modes=("rev",), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_bfloat16_is_multiplied_as_such_and_summed_in_float32(axis):
    """Values are the plain path's; gradients of logits are rounded to bfloat16 before their products, 2^-9 of each."""
    hidden, weight, tokens = some(jnp.bfloat16, axis=axis)
    weight = weight.astype(jnp.float32)  # as with param_dtype float32: its gradient is not rounded
    how = {"temperature": 1.0, "axis": axis, "chunk": 3}
    (values, grads), (want_values, want_grads) = (pulled(f, hidden, weight, tokens, **how) for f in (chunked, plain))
    np.testing.assert_allclose(values, want_values, atol=2e-6)
    assert grads[0].dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
    for got, want in zip(grads, want_grads, strict=True):
        want = np.asarray(want, np.float32)
        np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.01 * np.abs(want).max())
    assert np.unique(np.asarray(grads[1]).view(np.uint32) & 0xFFFF).size > 1, "the weight's gradient was summed in bfloat16"


@pytest.mark.parametrize("scale", [0.0, 1e3, 1e6])
def test_gradients_are_finite_with_equal_and_with_extreme_logits(scale):
    args = some(scale=scale)
    values, grads = pulled(chunked, *args, temperature=0.7, chunk=3)
    np.testing.assert_allclose(values, pulled(plain, *args, temperature=0.7)[0], rtol=1e-6)
    assert all(np.isfinite(x).all() for x in (*values, *grads)) and np.abs(grads[0]).max() > 0


def test_a_row_without_a_counted_token_has_no_gradient():
    hidden, weight, tokens = some()
    for poison in (0.0, 1e30):  # 1e30: logits overflow to +-inf where nothing is counted
        _, grads = pulled(chunked, hidden + poison, weight, tokens, temperature=0.7, chunk=3, pull=(0.0, 0.0))
        assert all((np.asarray(x) == 0).all() for x in grads)


def test_the_last_hidden_state_speaks_of_nothing():
    hidden, weight, tokens = some()
    clean, dirty = (pulled(chunked, x, weight, tokens, temperature=0.7, chunk=3) for x in (hidden, hidden.at[:, -1].set(jnp.nan)))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    np.testing.assert_array_equal(dirty[1][0][:, -1], 0)


def test_a_vocabulary_padded_with_minus_infinity():
    """Hidden states above 0 and weights of -inf: logits of -inf, which are in no sum and take no gradient."""
    hidden, weight, tokens = some()
    hidden, tokens = jnp.abs(hidden) + 0.1, tokens % 7
    padded, narrow = weight.at[:, 7:].set(-jnp.inf), weight[:, :7]
    (values, grads), (want, want_grads) = (pulled(chunked, hidden, w, tokens, temperature=0.7, chunk=3) for w in (padded, narrow))
    np.testing.assert_allclose(values, want, atol=1e-6)
    np.testing.assert_allclose(grads[1][:, :7], want_grads[1], atol=1e-5)
    np.testing.assert_array_equal(grads[1][:, 7:], 0)
    far = weight.at[:, 7:].set(-1e30)  # finite: then the hidden states' gradient is, too
    np.testing.assert_allclose(pulled(chunked, hidden, far, tokens, temperature=0.7, chunk=3)[1][0], want_grads[0], atol=1e-5)
    unlikely = chunked(hidden, padded, tokens.at[0, 1].set(9), temperature=1.0, chunk=3)[0]
    assert unlikely[0, 1] == -jnp.inf and np.isfinite(unlikely[1:]).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": (B, T - 1)}, r"got \(4, 8, 6\), \(6, 11\) and \(4, 7\)"),
        ({"vocab_axis": 0}, r"weight \[V, D\]"),
        ({"chunk": 0}, "chunk >= 1"),
        ({"row_shards": 3}, "divide 4 rows, got 5 and 3"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, says):
    hidden, weight, tokens = some()
    tokens = jnp.zeros(change.pop("tokens", tokens.shape), jnp.int32)
    with pytest.raises(ValueError, match=says):
        hidden_logprobs(hidden, weight, tokens, **({"temperature": 1.0, "chunk": 5} | change))


def test_one_position_has_nothing_to_say():
    hidden, weight, tokens = (x[:, :1] if x.ndim != 2 or x.shape == (B, T) else x for x in some())
    values, grads = pulled(chunked, hidden, weight, tokens, temperature=1.0, chunk=3)
    assert all((np.asarray(x) == 0).all() for x in (*values, *grads))


@pytest.mark.parametrize(
    ("rows", "length", "vocab", "expected"),
    [
        (128, 96, 128, None),  # the benchmarks' small size
        (1, 884, QWEN, None),  # 883 positions fit
        (1, 885, QWEN, 442),  # 884 do not: two chunks
        (2, 8192, QWEN, 432),  # 441 would fit: 19 chunks, as even as can be
        (1000, 3, QWEN, 1),
        (1000, 1, QWEN, None),
    ],
)
def test_a_chunk_is_as_many_positions_as_fit(rows, length, vocab, expected):
    assert auto_chunk(rows, length, vocab) == expected


def temporary(f, rows: int, length: int, axis: int, width: int = 256, **how) -> int:
    """Bytes that the compiled value and gradient need beside arguments and results; nothing is run."""
    hidden = jax.ShapeDtypeStruct((rows, length, width), jnp.float32)
    weight = jax.ShapeDtypeStruct((width, QWEN) if axis else (QWEN, width), jnp.float32)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def loss(hidden, weight, tokens):
        logp, entropy = f(hidden, weight, tokens, temperature=1.0, axis=axis, **how)
        return jnp.sum(logp) + 0.01 * jnp.sum(entropy)

    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, weight, tokens).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("rows", "length"), [(2, 8192), (16, 1024)])
@pytest.mark.parametrize("axis", [0, 1])
def test_16384_tokens_of_a_real_vocabulary_take_an_eighth_of_the_memory(rows, length, axis):
    whole = temporary(plain, rows, length, axis)
    assert whole > 2 * 16384 * QWEN * 4  # the logits and their gradient
    chunk = auto_chunk(rows, length, QWEN)
    part = temporary(chunked, rows, length, axis, chunk=chunk)
    assert whole >= 8 * part
    assert part < 4 * (3 * LOGITS + 2 * 256 * QWEN)  # three times the chunk's logits, twice the weight's gradient


PROGRAM = """
import re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from popo_jax.ops.hidden_logprobs import hidden_logprobs
from popo_jax.sharding import BATCH
assert jax.device_count() == 8
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
B, T, D, V = 8, 14, 24, 992
rng = np.random.default_rng(0)
hidden, tokens = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32), jnp.asarray(rng.integers(0, V, (B, T)))
a, b = rng.normal(size=(2, B, T)).astype(np.float32)
at = lambda spec: NamedSharding(mesh, spec)
for axis, spec in ((0, P("tensor", "fsdp")), (1, P("fsdp", "tensor"))):
    weight = jnp.asarray(rng.normal(size=(V, D) if axis == 0 else (D, V)), jnp.float32)
    def loss(hidden, weight, tokens, shards):
        logp, entropy = hidden_logprobs(hidden, weight, tokens, temperature=0.7, chunk=4, vocab_axis=axis, row_shards=shards)
        return jnp.sum(a * logp + b * entropy), (logp, entropy)
    step = jax.value_and_grad(loss, (0, 1), has_aux=True)
    alone = jax.jit(step, static_argnums=3)(hidden, weight, tokens, 1)
    out = ((at(P()), (at(BATCH), at(BATCH))), (at(BATCH), at(spec)))
    args = [jax.device_put(x, at(s)) for x, s in ((hidden, BATCH), (weight, spec), (tokens, BATCH))]
    program = jax.jit(step, static_argnums=3, out_shardings=out).lower(*args, 4).compile()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-5), alone, program(*args))
    place, seen = None, {True: 0, False: 0}
    for line in program.as_text().splitlines():
        if line.endswith("{") and "(" in line and " = " not in line:
            place = line.split()[0]
        got = re.search(r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\\(", line)
        if got is None:
            continue
        loop = place != "ENTRY"
        seen[loop] += 1
        for shape in re.findall(r"\\[([\\d,]*)\\]", got[1]):
            sizes = [int(x) for x in shape.split(",") if x]
            if any(x % (V // 8) == 0 for x in sizes):  # as wide as the vocabulary, or a device's part of it
                assert not loop, f"exchanged in every chunk: {line}"
                assert int(np.prod(sizes)) <= D * V and B // 4 * 4 not in sizes, line
                assert any(x in (D, D // 2) for x in sizes), f"not of the weight: {line}"
    assert seen[True] and seen[False], seen
"""


def test_eight_devices_exchange_no_logits_and_the_weights_gradient_once():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
