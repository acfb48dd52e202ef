"""MoPPS: the posterior by hand, what is chosen, draws that repeat, the checkpoint's arrays."""

from __future__ import annotations

import numpy as np
import pytest

from popo_jax.config import SelectionConfig
from popo_jax.data.selection import Mopps
from popo_jax.types import Prompt, UserError
from tests.replay import make

C = SelectionConfig(method="mopps", decay=0.5, prior=2.0)


def prompts(n: int) -> list[Prompt]:
    return [Prompt(f"p{i}", "countdown", "", np.zeros(1, np.int32), {}) for i in range(n)]


def graded(prompt: int, correct: list[float], id: int = 0):
    values = np.array(correct, np.float32)
    return make.group(id, G=len(correct), prompt_id=f"p{prompt}", correct=values, score=values)


def test_posterior_by_hand():
    m = Mopps(C, seed=0)
    assert m.posterior("p0") == (1, 1) and m.observed == 0
    assert m.observe([graded(0, [1, 0, 0, 0])])["selection/seen"] == 0
    assert m.posterior("p0") == (1 + 1, 1 + 3)
    out = m.observe([graded(0, [1, 1, 1, 0]), graded(1, [0.5, 1, 0, 0])])
    assert m.posterior("p0") == (0.5 * 2 + 0.5 + 3, 0.5 * 4 + 0.5 + 1)
    assert m.posterior("p1") == (1 + 1.5, 1 + 2.5)
    assert out == {"selection/seen": 0.5, "selection/error": pytest.approx(abs(2 / 6 - 0.75))}


def test_without_decay_counts_add_up_and_with_full_decay_only_the_last_stays():
    for decay, expected in ((1.0, (1 + 4, 1 + 4)), (1e-9, (1 + 3, 1 + 1))):
        m = Mopps(SelectionConfig(decay=decay), seed=0)
        m.observe([graded(0, [1, 0, 0, 0])])
        m.observe([graded(0, [1, 1, 1, 0])])
        assert m.posterior("p0") == pytest.approx(expected)


def test_invalid_groups_teach_nothing():
    m = Mopps(C, seed=0)
    out = m.observe([graded(0, [1, np.nan, 0, 0])])
    assert m.observed == 0 and np.isnan(out["selection/seen"]) and np.isnan(out["selection/error"])


def test_prompts_near_the_target_are_chosen_and_the_hopeless_and_the_solved_pass_by():
    m, every = Mopps(SelectionConfig(decay=1.0), seed=0), prompts(12)
    for _ in range(50):
        m.observe([graded(i, [[0] * 4, [1, 0, 1, 0], [1] * 4][i % 3]) for i in range(12)])
    for step in range(5):
        assert m.choose(every, 4, step=step, round_=0) == [1, 4, 7, 10]
    hard = Mopps(SelectionConfig(decay=1.0, target=0.0), seed=0)
    hard.load(m.arrays())
    assert hard.choose(every, 4, step=0, round_=0) == [0, 3, 6, 9]


def test_draws_explore_and_repeat():
    m, every = Mopps(C, seed=3), prompts(64)
    a, b, c = (m.choose(every, 8, step=s, round_=r) for s, r in ((1, 0), (2, 0), (1, 1)))
    assert a != b and a != c and a == sorted(a) and len(set(a)) == 8
    assert a == Mopps(C, seed=3).choose(every, 8, step=1, round_=0) != Mopps(C, seed=4).choose(every, 8, step=1, round_=0)
    counts = np.bincount(np.concatenate([m.choose(every, 8, step=s, round_=0) for s in range(400)]), minlength=64)
    assert counts.min() > 20  # 50 expected each: with nothing known, every prompt has its turn


def test_arrays_give_the_same_posteriors_back():
    m = Mopps(C, seed=0)
    m.observe([graded(0, [1, 0, 0, 0]), graded(7, [1, 1, 0, 0], 1)])
    other = Mopps(C, seed=0)
    other.load(m.arrays())
    assert other.posterior("p0") == m.posterior("p0") and other.posterior("p7") == m.posterior("p7") and other.observed == 2
    empty = Mopps(C, seed=0)
    empty.load(Mopps(C, seed=0).arrays())
    assert empty.observed == 0
    with pytest.raises(UserError, match=r"must hold its posteriors"):
        empty.load({"id": np.zeros(3)})
    with pytest.raises(UserError, match=r"selection_ids \(2,\), selection_counts \(1, 2\)"):
        empty.load(m.arrays() | {"selection_counts": np.ones((1, 2))})


def test_a_running_prior_follows_the_success_rate_and_lets_the_known_go_first():
    c = SelectionConfig(method="mopps", decay=1.0, prior=2.0, prior_mean="running")
    m = Mopps(c, seed=0)
    assert m.posterior("p0") == (1, 1)
    m.observe([graded(0, [1, 0, 0, 0]), graded(1, [0, 0, 0, 0], 1)])
    assert m.posterior("p9") == pytest.approx((2 * 2 / 10, 2 * 8 / 10))  # (1 + 1) of (2 + 8)
    m.observe([graded(1, [0, 0, 0, 0])])
    mean = (0.9 * 1 + 1) / (0.9 * 8 + 4 + 2)
    assert m.posterior("p9") == pytest.approx((2 * mean, 2 - 2 * mean))
    other = Mopps(c, seed=0)
    other.load(m.arrays())
    assert other.posterior("p9") == m.posterior("p9")
    for _ in range(20):
        m.observe([graded(0, [1, 0, 0, 1]), *(graded(i, [0, 0, 0, 0]) for i in range(1, 8))])
    every = prompts(64)
    first = np.mean([0 in m.choose(every, 8, step=s, round_=0) for s in range(100)])
    half = Mopps(SelectionConfig(decay=1.0), seed=0)
    half.load(m.arrays())
    assert first > 0.95 and np.mean([0 in half.choose(every, 8, step=s, round_=0) for s in range(100)]) < 0.95
