"""Plans by hand: which slots are filled, by what, in which order."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from popo_jax.config import PRESETS, ReplayConfig
from popo_jax.replay.buffer import Buffer
from popo_jax.replay.fill import candidates, digest, fill, to_store, usable
from popo_jax.types import FillPlan
from tests.replay import make

TABLE = ("effective", "all_right", "effective", "all_wrong")
DEAD = ("all_wrong",) * 4


def holding(versions: dict[int, int], c: ReplayConfig | None = None, *, at: int | None = None, **kw) -> Buffer:
    """A buffer with `versions[v]` groups of each version v, ids 100 v, 100 v + 1, ..."""
    buffer = Buffer(make.config() if c is None else c)
    for v, n in versions.items():
        groups = make.batch(["effective"] * n, version=v, **kw)
        buffer.store(groups, make.logp_start(n), slots=range(n), version=max(versions) + 1 if at is None else at)
    return buffer


def plan_of(buffer: Buffer, signals=DEAD, *, version: int, name: str = "popo", seed: int = 0, **kw) -> FillPlan:
    fresh = make.batch(signals, version=version)
    return fill(buffer, fresh, version=version, preset=PRESETS[name], seed=seed, step=version, **kw)


def test_exactly_the_ineffective_slots_get_the_newest_groups_in_slot_order():
    buffer = holding({0: 2, 1: 2})
    plan = plan_of(buffer, TABLE, version=3)
    assert plan.source.tolist() == [-1, 100, -1, 101] and plan.age.tolist() == [0, 2, 0, 2]
    assert plan.counted.tolist() == [True] * 4 and plan.replaced.tolist() == [False, True, False, True]
    assert (plan.source.dtype, plan.counted.dtype, plan.age.dtype) == (np.int64, bool, np.int32)
    assert [buffer.uses(i) for i in (0, 1, 100, 101)] == [0, 0, 1, 1] and len(buffer) == 4


def test_an_invalid_group_is_replaced_like_a_dead_one():
    assert plan_of(holding({0: 1}), ("effective", "invalid"), version=1).source.tolist() == [-1, 0]


def test_order_is_version_then_least_used_then_slot():
    buffer = holding({0: 1, 1: 3})
    buffer.use([100])
    assert plan_of(buffer, version=2).source.tolist() == [101, 102, 100, 0]


def test_more_ineffective_slots_than_stored_groups():
    plan = plan_of(holding({0: 2}), ("all_wrong", "effective", "all_right", "invalid"), version=1)
    assert plan.source.tolist() == [0, -1, 1, -1] and plan.counted.tolist() == [True, True, True, False]


def test_a_batch_without_dead_slots_uses_nothing():
    buffer = holding({0: 2})
    plan = plan_of(buffer, ["effective"] * 3, version=1)
    assert not plan.replaced.any() and plan.counted.all() and buffer.uses(0) == buffer.uses(1) == 0


def test_times_used_run_out():
    buffer = holding({0: 1}, make.config(max_uses=2))
    assert [plan_of(buffer, DEAD[:1], version=1).source.tolist() for _ in range(3)] == [[0], [0], [-1]]
    assert buffer.uses(0) == 2
    buffer.store([], make.logp_start(1), slots=[], version=2)
    assert len(buffer) == 0


@pytest.mark.parametrize(("version", "source"), [(9, [-1]), (10, [0]), (12, [0]), (13, [-1])])
def test_min_age_and_max_age_are_both_inclusive(version, source):
    buffer = holding({0: 1}, make.config(min_age=10, max_age=12), at=1)
    assert plan_of(buffer, DEAD[:1], version=version).source.tolist() == source
    assert [g.id for g in usable(buffer, version=version)] == [i for i in source if i >= 0]
    assert [g.id for g in candidates(buffer, version=version, n=5)] == [i for i in source if i >= 0]


@pytest.mark.parametrize(
    ("name", "counted"),
    [("grpo", [True] * 4), ("grpo-filter", [True, False, True, False]), ("dapo", [True, False, True, False])],
)
def test_presets_without_replay_leave_the_buffer_alone(name, counted):
    buffer = holding({0: 4})
    plan = plan_of(buffer, TABLE, version=1, name=name)
    assert plan.counted.tolist() == counted and not plan.replaced.any() and not plan.age.any()
    assert all(buffer.uses(g.id) == 0 for g in buffer) and to_store(make.batch(TABLE, version=1), PRESETS[name]) == []


def test_popo_without_a_buffer_plans_as_grpo_filter():
    plans = [plan_of(Buffer(make.config(capacity=0)), TABLE, version=1, name=name) for name in ("popo", "grpo-filter")]
    assert digest(plans[0]) == digest(plans[1])


def test_what_is_stored():
    fresh = make.batch(TABLE, version=0)
    assert [to_store(fresh, PRESETS[n]) for n in ("popo", "popo-kl", "popo-pi-old", "popo-ineff")] == [[0, 2]] * 3 + [
        [0, 1, 2, 3]
    ]


def test_ineff_takes_the_newest_stored_group_whatever_its_signal():
    c = make.config(quality="variance", selection="proportional")  # neither is read by this order
    buffer = Buffer(c)
    for v, signals in enumerate([["effective"] * 2, ["all_wrong", "effective", "invalid"]]):
        buffer.store(make.batch(signals, version=v), make.logp_start(3), slots=range(len(signals)), version=v + 1)
    assert plan_of(buffer, version=2, name="popo-ineff").source.tolist() == [100, 101, 102, 0]


def test_kl_takes_the_lowest_divergence_and_only_scored_groups():
    buffer = holding({0: 2, 1: 3})
    scores = {0: 0.3, 100: 0.3, 101: 0.1, 102: float("nan"), 999: 0.0}
    assert plan_of(buffer, version=2, name="popo-kl", divergence=scores).source.tolist() == [101, 100, 0, -1]
    with pytest.raises(ValueError, match="order kl must be given"):
        plan_of(buffer, version=2, name="popo-kl")


def test_candidates_are_the_newest_usable_groups():
    buffer = holding({0: 2, 1: 2, 2: 2}, make.config(max_age=2, max_uses=1), at=1)
    buffer.use([200])
    assert [g.id for g in candidates(buffer, version=3, n=2)] == [201, 100]
    assert [g.id for g in candidates(buffer, version=3, n=9)] == [201, 100, 101]
    assert [g.id for g in candidates(buffer, version=2, n=9)] == [100, 101, 0, 1]  # version 2 has age 0


def test_quality_variance_prefers_even_groups():
    buffer = Buffer(make.config(quality="variance", half_life=4.0))
    rare, even = np.array([1, 0, 0, 0], np.float32), np.array([1, 1, 0, 0], np.float32)
    groups = [
        make.group(0, version=0, correct=even),
        make.group(1, version=1, correct=rare),
        make.group(2, version=0, correct=rare),
    ]
    buffer.store(groups, make.logp_start(3), slots=range(3), version=2)
    assert plan_of(buffer, version=2).source.tolist() == [0, 1, 2, -1]


PROPORTIONAL = make.config(selection="proportional", half_life=1.0, max_uses=10**6, max_age=100)


def test_a_proportional_draw_is_a_function_of_seed_and_step():
    def order(seed: int, version: int) -> list[int]:
        return plan_of(holding({0: 8}, PROPORTIONAL, at=1), DEAD * 2, version=version, seed=seed).source.tolist()

    drawn = [order(0, 1), order(0, 2), order(1, 1), order(1, 2)]
    assert drawn == [order(0, 1), order(0, 2), order(1, 1), order(1, 2)]
    assert len({tuple(d) for d in drawn}) == 4 and all(sorted(d) == list(range(8)) for d in drawn)


def test_a_proportional_draw_is_proportional_and_without_replacement():
    """Versions 0, 1, 2 at half-life 1: weights 1, 2, 4; the first of two drawn, and the pair."""
    buffer, n = holding({0: 1, 1: 1, 2: 1}, PROPORTIONAL, at=1), 7000
    fresh = make.batch(DEAD[:2], version=3)
    drawn = [tuple(fill(buffer, fresh, version=3, preset=PRESETS["popo"], seed=0, step=s).source.tolist()) for s in range(n)]
    weights = {0: 1 / 7, 100: 2 / 7, 200: 4 / 7}
    chi2 = 0.0
    for a in weights:
        for b in weights.keys() - {a}:
            expected = n * weights[a] * weights[b] / (1 - weights[a])
            chi2 += (drawn.count((a, b)) - expected) ** 2 / expected
    assert all(a != b for a, b in drawn)
    assert chi2 < 20.5, chi2  # 5 degrees of freedom, one in a thousand


def test_a_proportional_draw_where_every_priority_underflows_keeps_the_order():
    c = dataclasses.replace(PROPORTIONAL, half_life=1e-3)
    assert plan_of(holding({0: 1, 1: 2}, c, at=1), DEAD, version=9).source.tolist() == [100, 101, 0, -1]


def test_digest_tells_plans_apart_and_is_stable():
    plan = FillPlan(np.array([-1, 7]), np.array([True, True]), np.array([0, 3], np.int32))
    same = FillPlan(np.array([-1, 7], np.int32), np.array([True, True]), np.array([0, 3], np.int64))
    assert digest(plan) == digest(same) and len(digest(plan)) == 64
    others = [
        dataclasses.replace(plan, source=np.array([-1, 8])),
        dataclasses.replace(plan, counted=np.array([True, False])),
        dataclasses.replace(plan, age=np.array([0, 4])),
        FillPlan(plan.source[:1], plan.counted[:1], plan.age[:1]),
    ]
    assert len({digest(p) for p in [plan, *others]}) == 5


def test_the_room_imports_no_jax():
    code = "import popo_jax.replay.fill, sys; sys.exit(any(m.split('.')[0] in ('jax', 'grain') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def random_config(rng: np.random.Generator) -> ReplayConfig:
    low = int(rng.integers(1, 4))
    return make.config(
        capacity=int(rng.integers(0, 12)),
        min_age=low,
        max_age=low + int(rng.integers(0, 5)),
        max_uses=int(rng.integers(1, 4)),
        quality=str(rng.choice(["uniform", "variance"])),
        selection=str(rng.choice(["top", "proportional"])),
        half_life=float(rng.choice([0.5, 4.0])),
    )


@pytest.mark.parametrize("seed", range(40))
def test_random_runs_keep_the_invariants(seed):
    rng = np.random.default_rng(seed)
    c = random_config(rng)
    name = str(rng.choice(["popo", "popo-ineff", "popo-kl"]))
    buffer, preset, given = Buffer(c), PRESETS[name], {}
    for version in range(25):
        signals = rng.choice(["effective", "all_right", "all_wrong", "invalid"], int(rng.integers(1, 7)), p=[0.4, 0.2, 0.3, 0.1])
        fresh = make.batch(signals.tolist(), version=version)
        before = {g.id: (buffer.uses(g.id), g.logp_behav.tobytes()) for g in buffer}
        old = usable(buffer, version=version)
        scores = {g.id: float(rng.random()) for g in candidates(buffer, version=version, n=4)}
        plan = fill(buffer, fresh, version=version, preset=preset, seed=seed, step=version, divergence=scores)

        dead = np.array([not g.effective for g in fresh])
        chosen = plan.source[plan.replaced].tolist()
        pool = scores.keys() if name == "popo-kl" else {g.id for g in old}
        assert len(set(chosen)) == len(chosen) == min(dead.sum(), len(pool)) and set(chosen) <= set(pool)
        assert not (plan.replaced & ~dead).any() and (plan.counted == (~dead | plan.replaced)).all()
        for slot in np.flatnonzero(plan.replaced):
            g = buffer[int(plan.source[slot])]
            assert plan.age[slot] == version - g.version and c.min_age <= plan.age[slot] <= c.max_age
        assert {g.id: buffer.uses(g.id) - before[g.id][0] for g in buffer} == {i: int(i in chosen) for i in before}
        assert all(buffer.uses(i) <= c.max_uses for i in chosen)
        for g in buffer:
            assert g.logp_behav.tobytes() == before[g.id][1] == given[g.id]

        keep, logp = to_store(fresh, preset), make.logp_start(len(fresh), seed=version)
        assert buffer.store([fresh[s] for s in keep], logp, slots=keep, version=version + 1) == 0
        given |= {g.id: g.logp_behav.tobytes() for g in buffer if g.id not in given}
        held = [g.id for g in buffer]
        alive = [i for i in [*before, *(fresh[s].id for s in keep)] if i in held]
        assert held == alive and len(held) == len(set(held)) <= c.capacity
        assert all(version + 1 - g.version <= c.max_age and buffer.uses(g.id) < c.max_uses for g in buffer)


def test_extra_slots_follow_the_dead_ones_and_stay_empty_without_stored_groups():
    buffer = holding({0: 3})
    plan = fill(buffer, make.batch(TABLE, version=1), version=1, preset=PRESETS["popo"], seed=0, step=1, extra=3)
    assert plan.source.tolist() == [-1, 0, -1, 1, 2, -1, -1]
    assert plan.counted.tolist() == [True] * 5 + [False] * 2 and plan.age.tolist() == [0, 1, 0, 1, 1, 0, 0]
