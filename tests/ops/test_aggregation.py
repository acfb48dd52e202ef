"""How per-token values of popo_jax.ops.losses become one number: by hand, and cut into micro-batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popo_jax.ops.losses import AGGREGATIONS, aggregate, denominator, numerator
from popo_jax.types import UserError
from tests.ops.test_losses import rows, surrogate

# Rows count 2, 1, 0 tokens; 99 is never counted.
VALUES = jnp.array([[99.0, 1.0, 4.0], [99.0, 7.0, 99.0], [99.0, 99.0, 99.0]])
COUNTED = jnp.array([[False, True, True], [False, True, False], [False, False, False]])


@pytest.mark.parametrize(
    "aggregation, above, below, mean",
    [("token", 12.0, 3.0, 4.0), ("sequence", 9.5, 2.0, 4.75), ("dr_grpo", 12.0, 30.0, 0.4)],
)
def test_aggregates_by_hand(aggregation, above, below, mean):
    assert numerator(VALUES, COUNTED, aggregation) == above
    assert denominator(COUNTED, aggregation=aggregation, response_limit=10) == below
    assert aggregate(VALUES, COUNTED, aggregation=aggregation, response_limit=10) == pytest.approx(mean)
    nothing = jnp.zeros_like(COUNTED)
    assert numerator(VALUES, nothing, aggregation) == aggregate(VALUES, nothing, aggregation=aggregation, response_limit=10) == 0
    assert denominator(nothing, aggregation=aggregation, response_limit=10) == (30 if aggregation == "dr_grpo" else 0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_to_the_whole(aggregation):
    """Numerators over parts of unequal counts, one denominator: equal in value and gradient, whatever the cut."""
    x = rows(3, B=12)

    def part(logp, b):
        values = surrogate(logp[b], *(a[b] for a in x[1:]))
        return numerator(values, x[4][b], aggregation)

    def loss(logp, size):
        below = denominator(x[4], aggregation=aggregation, response_limit=9)
        return sum(part(logp, slice(i, i + size)) for i in range(0, 12, size)) / below

    whole = jax.value_and_grad(lambda p: aggregate(surrogate(p, *x[1:]), x[4], aggregation=aggregation, response_limit=9))(x[0])
    for size in (1, 3, 12):
        value, grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)(x[0], size)
        assert float(value) == pytest.approx(float(whole[0]), rel=1e-5)
        np.testing.assert_allclose(grad, whole[1], atol=1e-7)


def test_poison_does_not_reach_an_aggregate():
    dirty = jnp.where(COUNTED, VALUES, jnp.nan)
    for aggregation in AGGREGATIONS:
        kw = {"aggregation": aggregation, "response_limit": 10}
        assert aggregate(dirty, COUNTED, **kw) == aggregate(VALUES, COUNTED, **kw)
        assert np.isfinite(jax.grad(lambda v, kw=kw: aggregate(v, COUNTED, **kw))(dirty)).all()


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(UserError, match=r"got 'sequnce' \(did you mean sequence\?\)"):
        numerator(VALUES, COUNTED, "sequnce")
    with pytest.raises(UserError, match="one of token, sequence, dr_grpo"):
        denominator(COUNTED, aggregation="mean", response_limit=10)
    with pytest.raises(UserError, match="response_limit"):
        denominator(COUNTED, aggregation="dr_grpo")
