"""A batch from a plan: every field of a slot from one group, laid out from column 0, nothing truncated."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from popo_jax.config import PRESETS
from popo_jax.data.assemble import assemble
from popo_jax.replay.buffer import Buffer
from popo_jax.replay.fill import fill
from popo_jax.types import FillPlan, UserError
from tests.replay import make

T, G = 15, 4
DTYPES = {
    **dict.fromkeys(("logp_behav", "logp_sampler", "adv"), np.float32),
    **dict.fromkeys(("sampled_mask", "token_mask", "fresh"), np.bool_),
    **dict.fromkeys(("tokens", "version"), np.int32),
}


def own(counted) -> FillPlan:
    n = len(counted)
    return FillPlan(np.full(n, -1, np.int64), np.array(counted, bool), np.zeros(n, np.int32))


def replay(source, counted=None) -> FillPlan:
    source = np.array(source, np.int64)
    return FillPlan(source, np.ones(len(source), bool) if counted is None else np.array(counted), np.zeros(len(source), np.int32))


def stored(*ids: int, **kw) -> dict:
    """Stored groups by id, version 3, their behaviour log-probs apart from the sampler's."""
    groups = [make.group(i, version=3, **kw) for i in ids]
    return {g.id: dataclasses.replace(g, logp_behav=(g.logp_sampler - 0.5).astype(np.float32), texts=()) for g in groups}


def by_hand(values: np.ndarray, group) -> np.ndarray:
    """[G, T] row by row."""
    out, first = np.zeros((len(group.lengths), T), values.dtype), 0
    for g, n in enumerate(group.lengths):
        out[g, :n] = values[first : first + n]
        first += n
    return out


def slot(x: np.ndarray, s: int) -> np.ndarray:
    return x[s * G : (s + 1) * G]


def test_every_field_of_a_slot_comes_from_one_group():
    fresh = make.batch(["effective", "all_right", "effective", "all_wrong"], version=5)
    old = stored(7, 8)
    batch = assemble(fresh, replay([-1, 8, -1, 7]), old, T=T, marked_fresh=False)
    assert {k: v.dtype for k, v in batch.items()} == DTYPES
    assert {k: v.shape for k, v in batch.items()} == {k: (16,) if k in ("adv", "fresh", "version") else (16, T) for k in DTYPES}
    for s, group in enumerate((fresh[0], old[8], fresh[2], old[7])):
        for name in ("tokens", "sampled_mask", "token_mask", "logp_sampler"):
            np.testing.assert_array_equal(slot(batch[name], s), by_hand(getattr(group, name), group), err_msg=f"{name} {s}")
        np.testing.assert_array_equal(slot(batch["adv"], s), group.adv)
        assert (slot(batch["version"], s) == group.version).all() and (slot(batch["fresh"], s) == (s in (0, 2))).all()
        behav = np.zeros((G, T)) if s in (0, 2) else by_hand(group.logp_behav, group)
        np.testing.assert_array_equal(slot(batch["logp_behav"], s), behav)


def test_a_row_by_hand():
    group = make.group(
        1,
        G=2,
        lengths=np.array([3, 2], np.int32),
        tokens=np.array([5, 6, 7, 5, 8], np.int32),
        sampled_mask=np.array([0, 1, 1, 0, 1], bool),
        token_mask=np.array([0, 1, 1, 0, 0], bool),
        logp_sampler=np.array([0, -1, -2, 0, -3], np.float32),
        score=np.zeros(2, np.float32),
        correct=np.zeros(2, np.float32),
        adv=np.array([1, -1], np.float32),
        ended=np.array([True, False]),
        version=9,
    )
    batch = assemble([group], own([True]), {}, T=4, marked_fresh=False)
    assert batch["tokens"].tolist() == [[5, 6, 7, 0], [5, 8, 0, 0]]
    assert batch["sampled_mask"].tolist() == [[False, True, True, False], [False, True, False, False]]
    assert batch["token_mask"].tolist() == [[False, True, True, False], [False] * 4]
    assert batch["logp_sampler"].tolist() == [[0, -1, -2, 0], [0, -3, 0, 0]] and not batch["logp_behav"].any()
    assert batch["adv"].tolist() == [1, -1] and batch["version"].tolist() == [9, 9] and batch["fresh"].all()


def test_a_slot_that_is_not_counted_keeps_its_row_and_loses_its_mask():
    fresh = make.batch(["effective", "all_wrong"], version=1)
    batch = assemble(fresh, own([True, False]), {}, T=T, marked_fresh=False)
    assert slot(batch["token_mask"], 0).any() and not slot(batch["token_mask"], 1).any()
    np.testing.assert_array_equal(slot(batch["tokens"], 1), by_hand(fresh[1].tokens, fresh[1]))
    np.testing.assert_array_equal(slot(batch["sampled_mask"], 1), by_hand(fresh[1].sampled_mask, fresh[1]))
    assert batch["fresh"].all() and fresh[1].token_mask.any()


def test_marked_fresh_hides_that_a_row_is_replayed_and_keeps_its_version():
    fresh, old = make.batch(["effective", "all_wrong"], version=5), stored(7)
    batch = assemble(fresh, replay([-1, 7]), old, T=T, marked_fresh=True)
    assert batch["fresh"].all() and not batch["logp_behav"].any() and (slot(batch["version"], 1) == 3).all()
    np.testing.assert_array_equal(slot(batch["tokens"], 1), by_hand(old[7].tokens, old[7]))


def test_reference_log_probs_ride_along_when_the_step_has_them():
    fresh, old = make.batch(["effective", "all_wrong"], version=5, ref=True), stored(7, ref=True)
    batch = assemble(fresh, replay([-1, 7]), old, T=T, marked_fresh=False)
    assert batch["logp_ref"].dtype == np.float32
    for s, group in enumerate((fresh[0], old[7])):
        np.testing.assert_array_equal(slot(batch["logp_ref"], s), by_hand(group.logp_ref, group))
    with pytest.raises(UserError, match="group 7 of the replay buffer must carry log-probs of the reference"):
        assemble(fresh, replay([-1, 7]), stored(7), T=T, marked_fresh=False)
    without = make.batch(["effective", "all_wrong"], version=5)
    assert "logp_ref" not in assemble(without, replay([-1, 7]), old, T=T, marked_fresh=False)


def test_nothing_is_truncated():
    group = make.group(1, T=12)
    longest = int(group.lengths.max())
    assert assemble([group], own([True]), {}, T=longest, marked_fresh=False)["tokens"].shape == (4, longest)
    with pytest.raises(
        ValueError, match=f"group 1 in slot 0 must have 4 rows of at most {longest - 1} tokens, got 4 rows of up to {longest}"
    ):
        assemble([group], own([True]), {}, T=longest - 1, marked_fresh=False)


def test_groups_of_another_size_are_refused():
    with pytest.raises(ValueError, match="group 2 in slot 1 must have 4 rows"):
        assemble([make.group(1), make.group(2, G=3)], own([True, True]), {}, T=T, marked_fresh=False)


def test_stored_log_probs_survive_the_batch_they_ride_in():
    """Through the real buffer: what comes out is the cut of `logp_start` that went in, and writing to the batch leaves it."""
    buffer, logp = Buffer(make.config()), make.logp_start(2, T=T)
    first = make.batch(["effective", "effective"], version=0)
    buffer.store(first, logp, slots=[0, 1], version=1)
    fresh = make.batch(["all_wrong", "effective"], version=1)
    plan = fill(buffer, fresh, version=1, preset=PRESETS["popo"], seed=0, step=1)
    batch = assemble(fresh, plan, buffer, T=T, marked_fresh=False)
    used = np.arange(T) < first[0].lengths[:, None]
    np.testing.assert_array_equal(slot(batch["logp_behav"], 0), np.where(used, logp[:G], 0))
    assert not slot(batch["logp_behav"], 1).any()
    kept = buffer[0].logp_behav.copy()
    for x in batch.values():
        x[...] = 1
    np.testing.assert_array_equal(buffer[0].logp_behav, kept)
    assert not (fresh[1].tokens == 1).all()


def test_it_is_cheap():
    """32 x 8 rows of 48: about 0.5 ms on one core; the bound is loose for shared machines."""
    fresh, old = [make.group(i, G=8, T=48) for i in range(32)], stored(*range(100, 110), G=8, T=48)
    plan, times = replay([*range(100, 110), *[-1] * 22]), []
    for _ in range(20):
        began = time.process_time()
        assemble(fresh, plan, old, T=48, marked_fresh=False)
        times.append(time.process_time() - began)
    assert min(times) < 2e-3
