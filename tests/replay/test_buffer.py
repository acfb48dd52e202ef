"""What is kept, what goes, and the round trip through arrays."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest

from popo_jax.config import PRESETS
from popo_jax.replay.buffer import Buffer
from popo_jax.replay.fill import digest, fill
from popo_jax.types import UserError
from tests.replay import make


def put(buffer: Buffer, groups, *, at: int, slots=None, logp=None) -> int:
    """Store `groups` from slots 0, 1, ... with the current version `at`."""
    logp = make.logp_start(8) if logp is None else logp
    return buffer.store(groups, logp, slots=list(range(len(groups))) if slots is None else slots, version=at)


def ids(buffer: Buffer) -> list[int]:
    return [g.id for g in buffer]


def test_a_stored_group_keeps_the_cut_of_its_own_slot():
    buffer, logp, fresh = Buffer(make.config()), make.logp_start(4), make.group(7, version=3)
    assert put(buffer, [fresh], at=4, slots=[2], logp=logp) == 0
    stored = buffer[7]
    rows = [logp[2 * 4 + g, : fresh.lengths[g]] for g in range(4)]
    np.testing.assert_array_equal(stored.logp_behav, np.concatenate(rows))
    assert stored.logp_behav.dtype == np.float32 and stored.texts == stored.reasons == ()
    assert make.same(dataclasses.replace(stored, logp_behav=None, texts=fresh.texts, reasons=fresh.reasons), fresh)
    assert len(buffer) == 1 and 7 in buffer and buffer.uses(7) == 0


def test_stored_log_probs_are_a_copy_and_cannot_be_written():
    buffer, logp = Buffer(make.config()), make.logp_start(1)
    put(buffer, [make.group(1)], at=1, logp=logp)
    before = buffer[1].logp_behav.copy()
    logp[:] = 99
    np.testing.assert_array_equal(buffer[1].logp_behav, before)
    with pytest.raises(ValueError, match="read-only"):
        buffer[1].logp_behav[0] = 0
    fill(buffer, make.batch(["all_wrong"], version=1), version=1, preset=PRESETS["popo"], seed=0, step=1)
    put(buffer, make.batch(["effective"], version=1), at=2)
    np.testing.assert_array_equal(buffer[1].logp_behav, before)


def test_groups_without_signal_keep_the_samplers_log_probs():
    """Their slot trained on another group, or on nothing: `logp_start` does not speak of them."""
    buffer, group = Buffer(make.config()), make.group(1, signal="all_wrong")
    put(buffer, [group], at=1)
    np.testing.assert_array_equal(buffer[1].logp_behav, group.logp_sampler)
    assert group.logp_sampler.flags.writeable and buffer[1].logp_behav is not group.logp_sampler


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_log_probs_that_are_not_finite_are_refused(bad):
    buffer, groups, logp = Buffer(make.config()), make.batch(["effective"] * 3, version=0), make.logp_start(3)
    first, second = groups[0], groups[1]
    on = int(np.flatnonzero(first.sampled_mask[: first.lengths[0]])[0])
    off = int(np.flatnonzero(~second.sampled_mask[: second.lengths[0]])[0])
    logp[0, on] = bad
    logp[4, off] = bad  # a prompt token: nobody reads it
    logp[8, -1] = bad if groups[2].lengths[0] < 12 else logp[8, -1]  # padding
    assert put(buffer, groups, at=1, logp=logp) == 1
    assert ids(buffer) == [1, 2]


def test_full_buffer_is_first_in_first_out_over_versions():
    buffer = Buffer(make.config(capacity=5))
    for v in range(4):
        put(buffer, make.batch(["effective"] * 2, version=v), at=v + 1)
    assert ids(buffer) == [100, 200, 201, 300, 301]  # of version 1 the last slot went first: the reverse of the order


def test_the_expired_go_before_the_worst():
    # capacity 3; group 0 is old but fresh in use, 100 is used up, 200 and 201 are the newest
    buffer = Buffer(make.config(capacity=3, max_uses=2))
    put(buffer, make.batch(["effective"], version=0), at=1)
    put(buffer, make.batch(["effective"], version=1), at=2)
    buffer.use([100])
    buffer.use([100])
    put(buffer, make.batch(["effective"] * 2, version=2), at=3)
    assert ids(buffer) == [0, 200, 201]


@pytest.mark.parametrize(("at", "left"), [(8, [0, 1]), (9, [])])
def test_groups_older_than_max_age_go_though_there_is_room(at, left):
    buffer = Buffer(make.config(max_age=8))
    put(buffer, make.batch(["effective"] * 2, version=0), at=1)
    put(buffer, [], at=at)
    assert ids(buffer) == left


def test_within_a_version_the_most_used_goes_first():
    buffer = Buffer(make.config(capacity=2, max_uses=4))
    put(buffer, make.batch(["effective"] * 2, version=0), at=1)
    buffer.use([0])
    put(buffer, make.batch(["effective"], version=1), at=2)
    assert ids(buffer) == [1, 100]


def test_quality_decides_what_goes():
    poor, good = np.array([1, 0, 0, 0], np.float32), np.array([1, 1, 0, 0], np.float32)
    buffer = Buffer(make.config(capacity=2, quality="variance", half_life=8.0))
    put(buffer, [make.group(0, version=0, correct=good)], at=1)
    put(buffer, [make.group(1, version=1, correct=poor), make.group(2, version=1, correct=good)], at=2)
    assert ids(buffer) == [0, 2]  # 1 * 0.5^(2/8) = 0.84, 0.75 * 0.5^(1/8) = 0.69, 0.92


def test_capacity_zero_stores_nothing_and_still_counts_the_refused():
    buffer, logp = Buffer(make.config(capacity=0)), make.logp_start(2)
    logp[:4] = np.nan
    assert put(buffer, make.batch(["effective"] * 2, version=0), at=1, logp=logp) == 1
    assert len(buffer) == 0 and list(buffer.arrays()["tokens"]) == []


def test_storing_order_is_slot_order_whatever_the_call():
    buffer, groups = Buffer(make.config()), make.batch(["effective"] * 3, version=0)
    put(buffer, [groups[2], groups[0], groups[1]], at=1, slots=[2, 0, 1])
    assert ids(buffer) == [0, 1, 2]


def test_bugs_of_the_caller_are_loud():
    buffer = Buffer(make.config())
    put(buffer, [make.group(1)], at=1)
    with pytest.raises(ValueError, match="group 1 is stored already"):
        put(buffer, [make.group(1)], at=2)
    for slots, logp in (([2], make.logp_start(2)), ([-1], make.logp_start(2)), ([0], make.logp_start(2, T=2))):
        with pytest.raises(ValueError, match=r"group 2 of slot -?\d has 4 rows of up to \d+ tokens, logp_start \(8, "):
            put(buffer, [make.group(2)], at=1, slots=slots, logp=logp)
    with pytest.raises(ValueError, match="zip"):
        put(buffer, [make.group(3)], at=1, slots=[])


def saved(buffer: Buffer) -> dict[str, np.ndarray]:
    """Through a real npz file, no pickles."""
    file = io.BytesIO()
    np.savez(file, **buffer.arrays())
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def ragged() -> Buffer:
    """Groups of all signals, with and without logp_ref, one task name not ASCII, some used."""
    buffer = Buffer(make.config(max_uses=3))
    put(buffer, [make.group(0, ref=True), make.group(1, task="géométrie")], at=1)
    put(buffer, make.batch(["all_wrong", "invalid", "effective"], version=1, ref=True), at=2)
    buffer.use([0, 101])
    buffer.use([0])
    return buffer


def test_round_trip_is_equal_to_the_bit():
    a = ragged()
    b = Buffer.from_arrays(a.c, saved(a))
    assert ids(a) == ids(b) == [0, 1, 100, 101, 102]
    assert [b.uses(i) for i in ids(b)] == [2, 0, 0, 1, 0] and [g.logp_ref is None for g in b] == [
        False,
        True,
        False,
        False,
        False,
    ]
    assert all(make.same(x, y) for x, y in zip(a, b, strict=True))
    for name, x in a.arrays().items():
        y = b.arrays()[name]
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), name
    assert not b[0].logp_behav.flags.writeable


def test_a_restored_buffer_behaves_as_the_first_did():
    a = ragged()
    b = Buffer.from_arrays(a.c, saved(a))
    for version in range(2, 14):
        signals = ["effective", "all_wrong", "all_right", "effective"] if version % 3 else ["all_wrong"] * 4
        fresh = make.batch(signals, version=version)
        plans = [fill(x, fresh, version=version, preset=PRESETS["popo"], seed=1, step=version) for x in (a, b)]
        assert digest(plans[0]) == digest(plans[1])
        for x in (a, b):
            put(x, [g for g in fresh if g.effective], at=version + 1)
        assert ids(a) == ids(b) and [a.uses(i) for i in ids(a)] == [b.uses(i) for i in ids(b)]


def test_an_empty_buffer_round_trips():
    b = Buffer.from_arrays(make.config(), saved(Buffer(make.config())))
    assert len(b) == 0 and {k: v.dtype for k, v in b.arrays().items()} == {
        k: v.dtype for k, v in Buffer(make.config()).arrays().items()
    }
    assert len(Buffer.from_arrays(make.config(capacity=0), b.arrays())) == 0


def test_what_does_not_fit_or_is_not_whole_is_refused():
    arrays = ragged().arrays()
    with pytest.raises(UserError, match=r"replay\.capacity must hold the 5 groups of the stored buffer, got 4"):
        Buffer.from_arrays(make.config(capacity=4), arrays)
    assert len(Buffer.from_arrays(make.config(capacity=5), arrays)) == 5
    with pytest.raises(UserError, match=r"got none named adv$"):
        Buffer.from_arrays(make.config(), {k: v for k, v in arrays.items() if k != "adv"})
    for name in arrays:
        with pytest.raises(UserError, match=r"of a stored replay buffer must have \d+ entries, got \d+"):
            Buffer.from_arrays(make.config(), arrays | {name: arrays[name][:-1]})


def test_a_field_of_another_dtype_is_not_written_quietly():
    buffer = Buffer(make.config())
    put(buffer, [make.group(1, tokens=make.group(1).tokens.astype(np.int64))], at=1)
    with pytest.raises(TypeError, match="int64"):
        buffer.arrays()


def test_it_knows_its_size():
    """What comes in is added, what goes out taken away; a restored one is as large."""
    buffer = Buffer(make.config(capacity=3))
    for step in range(6):
        put(buffer, [make.group(2 * step, version=step), make.group(2 * step + 1, version=step)], at=step + 1)
        groups = [v for g in buffer for v in vars(g).values() if isinstance(v, np.ndarray)]
        assert buffer.nbytes == sum(v.nbytes for v in groups) > 0
    assert len(buffer) == 3 and Buffer.from_arrays(make.config(capacity=3), buffer.arrays()).nbytes == buffer.nbytes
