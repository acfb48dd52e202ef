from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popo_jax.model_config import ModelConfig
from popo_jax.models.linear import linear, resolve_linear


@pytest.mark.parametrize(("platform", "kind"), [("cpu", "barrier"), ("gpu", "plain"), ("tpu", "plain")])
def test_auto_is_barrier_on_cpu_alone(platform, kind):
    assert resolve_linear(ModelConfig(), platform).linear == kind


def test_a_chosen_kind_stays(platform="cpu"):
    assert resolve_linear(ModelConfig(linear="plain"), platform).linear == "plain"


@pytest.mark.parametrize("kind", ["plain", "barrier"])
def test_values_and_gradients_are_those_of_the_formula(kind):
    x, w, b, g = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 3, 5), (5, 4), (4,), (2, 3, 4)]))
    y, pull = jax.vjp(lambda *a: linear(*a, kind=kind), x, w, b)
    np.testing.assert_allclose(y, np.asarray(x) @ np.asarray(w) + np.asarray(b), rtol=1e-5, atol=1e-6)
    dx, dw, db = pull(g)
    np.testing.assert_allclose(dx, np.einsum("btf,df->btd", g, w), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dw, np.einsum("btd,btf->df", x, g), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(db, np.einsum("btf->f", g), rtol=1e-5, atol=1e-6)


def test_the_barrier_is_in_the_backward_program():
    def text(kind):
        return (
            jax.jit(jax.grad(lambda w: jnp.sin(linear(jnp.ones((3, 5)), w, kind=kind)).sum())).lower(jnp.ones((5, 4))).as_text()
        )

    assert "optimization_barrier" in text("barrier")
    assert "optimization_barrier" not in text("plain")


def test_auto_must_have_been_resolved():
    with pytest.raises(ValueError, match="got 'auto'"):
        linear(jnp.ones((2, 5)), jnp.ones((5, 4)), kind="auto")
