"""The loop itself: replay through the real trainer, identities between presets, counters, stops."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from popo_jax import train
from popo_jax.data import tokenizer as tokenizers
from popo_jax.rl.rollout import cut, lay_out, reference_scorer
from popo_jax.rl.state import Batch
from popo_jax.tasks.graders import Graders
from popo_jax.types import UserError, Verdict
from tests import chatty, tiny

MIXED = ["mixed"] * 4
TABLE = ["mixed", "all right", "mixed", "all wrong"]


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def spied(parts: train.Parts) -> tuple[train.Parts, list]:
    """The parts with every (state before, batch, out) of the train step recorded as numpy."""
    seen, real = [], parts.built.train_step

    def step(state, batch):
        before = jax.tree.map(np.asarray, (state, batch))
        after, out = real(state, batch)
        seen.append((*before, jax.tree.map(np.asarray, out)))
        return after, out

    return dataclasses.replace(parts, built=dataclasses.replace(parts.built, train_step=step)), seen


def go(path, c, grade):
    path.mkdir(parents=True, exist_ok=True)
    parts, seen = spied(tiny.parts(path, c, grade=grade))
    state, _ = train.loop(parts, tiny.state(parts.built), tiny.Progress())
    return state, seen, parts


def same(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)))


@pytest.mark.parametrize("M", [1, 2])
def test_exactly_the_ineffective_slots_are_replaced_by_whole_stored_groups(tmp_path, M):
    c = tiny.config(steps=2, batch__mini_batches=M)
    _, seen, parts = go(tmp_path, c, tiny.by_pattern([MIXED, TABLE]))
    (_, first, out0), (before, batch, out1) = seen
    G = c.batch.group_size
    slot = [slice(s * G, (s + 1) * G) for s in range(4)]
    np.testing.assert_array_equal(batch.fresh.reshape(4, G).all(axis=1), [True, False, True, False])
    np.testing.assert_array_equal(batch.fresh.reshape(4, G).any(axis=1), [True, False, True, False])
    # the newest stored groups in slot order: those of slots 0 and 1 of the step before, every field from one of them
    for replaced, source in ((1, 0), (3, 1)):
        for name in ("tokens", "sampled_mask", "token_mask", "logp_sampler", "adv"):
            np.testing.assert_array_equal(getattr(batch, name)[slot[replaced]], getattr(first, name)[slot[source]], err_msg=name)
        np.testing.assert_array_equal(batch.version[slot[replaced]], 0)
        np.testing.assert_array_equal(batch.logp_behav[slot[replaced]], out0.logp_start[slot[source]])
    # fresh slots keep their own rows
    assert (batch.version[slot[0]] == 1).all() and not np.array_equal(batch.tokens[slot[0]], first.tokens[slot[0]])
    # weights are not 1, ratios in the first mini-batch are
    mask = batch.token_mask & ~batch.fresh[:, None]
    w = np.exp(out1.logp_start - batch.logp_behav)[mask]
    assert np.abs(w - 1).max() > 1e-3
    assert float(out1.metrics["weight/max"]) == pytest.approx(w.max(), rel=1e-4)
    now = np.asarray(parts.built.score(jax.tree.map(np.asarray, before.params), batch.tokens))
    np.testing.assert_allclose(out1.logp_start[mask], now[mask], atol=1e-6)
    if M == 1:
        assert float(out1.metrics["clip/low_replayed"]) == float(out1.metrics["clip/high_replayed"]) == 0
    # and the buffer kept the stored log-probs as they were, although the groups were used again
    for group, source in zip(list(parts.buffer)[:2], (0, 1), strict=True):
        cut = np.arange(c.row_tokens) < group.lengths[:, None]
        np.testing.assert_array_equal(group.logp_behav, out0.logp_start[slot[source]][cut])
        assert parts.buffer.uses(group.id) == 1
    row = rows(tmp_path)[-1]
    assert (row["replay/filled"], row["replay/unfilled"], row["replay/age_max"]) == (2, 0, 1)
    assert (row["groups/effective"], row["groups/all_right"], row["groups/all_wrong"]) == (0.5, 0.25, 0.25)
    replayed = pq.read_table(tmp_path / "replays" / "000002.parquet").to_pydict()
    assert replayed == {"slot": [1, 3], "group_id": [g.id for g in list(parts.buffer)[:2]], "age": [1, 1]}


def test_stored_log_probs_are_their_own_groups_where_rows_change_places(tmp_path, monkeypatch):
    """Micro-batches sorted by length, in the real loop: what is stored with a group is what the policy of then says of it."""
    kw = {"batch__micro_batch": 2, "batch__length_buckets": 4, "sample__max_response_tokens": 16, "batch__mini_batches": 2}
    orders, real = [], train.arrange
    monkeypatch.setattr(train, "arrange", lambda rows, c: orders.append(real(rows, c)[1]) or real(rows, c))
    _, seen, parts = go(tmp_path, tiny.config(steps=3, **kw), tiny.by_pattern([MIXED, TABLE]))
    assert len(orders) == 3 and all((order // 4 != np.arange(16) // 4).any() for order in orders), "no row left its slot"
    assert [r["replay/filled"] for r in rows(tmp_path)] == [0, 2, 2]
    assert all(r["mismatch/mean"] < 1e-5 for r in rows(tmp_path))
    for group in parts.buffer:
        params = jax.tree.map(np.asarray, seen[group.version][0].params)
        logp = np.asarray(parts.built.score(params, lay_out([group], 40, 4)))
        np.testing.assert_allclose(np.where(group.sampled_mask, cut(logp, group), 0), group.logp_behav, atol=1e-5)


def test_a_replayed_group_is_not_stored_again(tmp_path):
    _, _, parts = go(tmp_path, tiny.config(steps=3), tiny.by_pattern([MIXED, TABLE, TABLE]))
    ids = [g.id for g in parts.buffer]
    assert len(ids) == len(set(ids)) == 8  # 4 + 2 + 2 fresh effective ones


def test_popo_without_a_buffer_is_grpo_filter_to_the_bit(tmp_path):
    pattern = [TABLE, MIXED] * 5
    final = {}
    for name, kw in {"popo": {"replay__capacity": 0}, "grpo-filter": {}}.items():
        c = tiny.config(steps=10, algorithm__name=name, **kw)
        final[name], seen, _ = go(tmp_path / name, c, tiny.by_pattern(pattern))
        assert all(r["replay/filled"] == 0 for r in rows(tmp_path / name))
        assert [r["replay/unfilled"] for r in rows(tmp_path / name)] == [2, 0] * 5
        assert not seen[0][1].token_mask[4:8].any() and seen[0][1].token_mask[:4].any()
    assert same(final["popo"], final["grpo-filter"])
    replaying, _, _ = go(tmp_path / "on", tiny.config(steps=10), tiny.by_pattern(pattern))
    assert sum(r["replay/filled"] for r in rows(tmp_path / "on")) > 0
    assert not same(final["popo"].params, replaying.params)


def test_popo_is_grpo_to_the_bit_where_every_group_is_effective(tmp_path):
    final = {}
    for name in ("popo", "grpo"):
        final[name], _, _ = go(tmp_path / name, tiny.config(steps=10, algorithm__name=name), tiny.by_pattern([MIXED]))
    assert same(final["popo"], final["grpo"])
    assert rows(tmp_path / "popo")[-1]["replay/size"] == 16 and rows(tmp_path / "grpo")[-1]["replay/size"] == 0
    with_dead = {}
    for name in ("popo", "grpo"):
        with_dead[name], _, _ = go(tmp_path / f"{name}2", tiny.config(steps=3, algorithm__name=name), tiny.by_pattern([TABLE]))
    assert not same(with_dead["popo"].params, with_dead["grpo"].params)


def test_grpo_trains_on_its_dead_groups_with_advantage_zero(tmp_path):
    _, seen, _ = go(tmp_path, tiny.config(steps=1, algorithm__name="grpo"), tiny.by_pattern([TABLE]))
    batch = seen[0][1]
    assert batch.token_mask.reshape(4, -1).any(axis=1).all() and (batch.adv[4:8] == 0).all() and (batch.adv[:4] != 0).all()


def test_dapo_samples_in_rounds_until_every_slot_is_effective(tmp_path):
    c = tiny.config(steps=1, algorithm__name="dapo")
    _, seen, _ = go(tmp_path, c, tiny.by_pattern([TABLE, ["all wrong"] * 4, MIXED]))
    row = rows(tmp_path)[0]
    assert row["rollouts_total"] == 3 * 16 and row["groups/effective"] == 0.5  # 6 of 12, every round counted
    batch, sampled = seen[0][1], pq.read_table(tmp_path / "samples" / "000001.parquet").to_pylist()
    assert batch.fresh.all() and batch.token_mask.reshape(4, -1).any(axis=1).all() and (batch.adv != 0).all()
    # slots: two of round 0 in order, then the first two of round 2
    by_id = {g: [r for r in sampled if r["group_id"] == g] for g in (0, 2, 8, 9)}
    lengths = [r["prompt_tokens"] + r["response_tokens"] for g in (0, 2, 8, 9) for r in by_id[g]]
    assert [int(np.flatnonzero(m)[-1]) + 1 for m in batch.sampled_mask] == lengths
    assert len({r["prompt_id"] for r in sampled}) == 12


def test_dapo_masks_what_stays_empty_after_the_last_round(tmp_path):
    c = tiny.config(steps=1, algorithm__name="dapo", algorithm__max_rounds=2)
    _, seen, _ = go(tmp_path, c, tiny.by_pattern([TABLE, ["all wrong"] * 4]))
    assert rows(tmp_path)[0]["rollouts_total"] == 32 and rows(tmp_path)[0]["replay/unfilled"] == 2
    np.testing.assert_array_equal(seen[0][1].token_mask.reshape(4, -1).any(axis=1), [True, False, True, False])


def test_dapo_rounds_draw_anew(tmp_path):
    """The key folds in the round: the same prompt in another round gets other responses."""
    c = tiny.config(steps=1, algorithm__name="dapo", algorithm__max_rounds=2, tasks=[one_problem()])
    go(tmp_path, c, tiny.by_pattern([["all wrong"] * 4]))
    texts = [r["text"] for r in pq.read_table(tmp_path / "samples" / "000001.parquet").to_pylist()]
    assert len(texts) == 32 and texts[:16] != texts[16:]


def one_problem():
    return {"name": "countdown", "countdown": {"train_problems": 1, "eval_problems": 16}}


def test_pi_old_marks_replayed_rows_fresh(tmp_path):
    _, seen, _ = go(tmp_path, tiny.config(steps=2, algorithm__name="popo-pi-old"), tiny.by_pattern([MIXED, TABLE]))
    batch, out = seen[1][1:]
    assert batch.fresh.all() and (batch.version[4:8] == 0).all() and np.isnan(out.metrics["weight/mean"])
    assert rows(tmp_path)[-1]["replay/filled"] == 2


def test_ineff_stores_and_replays_groups_without_signal(tmp_path):
    _, seen, parts = go(tmp_path, tiny.config(steps=2, algorithm__name="popo-ineff"), tiny.by_pattern([TABLE]))
    assert len(parts.buffer) == 8 and not all(g.effective for g in parts.buffer)
    first, batch = seen[0][1], seen[1][1]
    np.testing.assert_array_equal(batch.tokens[12:16], first.tokens[4:8])  # slot 3 <- the all-right group of slot 1
    assert (batch.adv[12:16] == 0).all()


def test_stale_waits_for_ten_updates(tmp_path):
    c = tiny.config(steps=12, algorithm__name="popo-stale")
    go(tmp_path, c, tiny.by_pattern([MIXED] + [TABLE] * 11))
    filled = [r["replay/filled"] for r in rows(tmp_path)]
    assert filled[:10] == [0] * 10 and filled[10] == 2 and rows(tmp_path)[10]["replay/age_max"] == 10


def test_kl_takes_the_group_nearest_to_the_current_policy(tmp_path):
    _, seen, parts = go(tmp_path, tiny.config(steps=4, algorithm__name="popo-kl"), tiny.by_pattern([MIXED, MIXED, MIXED, TABLE]))
    state, batch, _ = seen[3]
    logp = np.asarray(parts.built.score(jax.tree.map(np.asarray, state.params), np.concatenate([s[1].tokens for s in seen[:3]])))
    d = logp - np.concatenate([s[2].logp_start for s in seen[:3]])
    mask = np.concatenate([s[1].token_mask for s in seen[:3]])
    k3 = np.where(mask, np.exp(d) - 1 - d, 0).reshape(12, -1).sum(1) / mask.reshape(12, -1).sum(1)
    nearest = np.argsort(k3)[:2]
    assert k3[nearest[1]] < np.sort(k3)[2]
    tokens = np.concatenate([s[1].tokens for s in seen[:3]]).reshape(12, 4, -1)
    np.testing.assert_array_equal(batch.tokens[4:8], tokens[nearest[0]])
    np.testing.assert_array_equal(batch.tokens[12:16], tokens[nearest[1]])


def test_each_run_compiles_the_step_once_and_nothing_in_the_loop(tmp_path):
    """One trace of the train step, whatever the number of replayed slots; no compilation after the second step."""
    c, compiled = tiny.config(steps=6), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
    )
    counts = []
    real = tiny.by_pattern([MIXED, TABLE, ["all wrong"] * 4, MIXED, TABLE, ["all right"] * 4])
    parts = tiny.parts(tmp_path, c, grade=lambda jobs: counts.append(len(compiled)) or real(jobs))
    train.loop(parts, tiny.state(parts.built), tiny.Progress())
    assert parts.built.train_step._cache_size() == 1
    assert {r["replay/filled"] for r in rows(tmp_path)} == {0, 2, 4}
    assert counts[0] > 0 and len(compiled) == counts[2], "something was compiled after the second step"


def test_counters_and_rows(tmp_path):
    c = tiny.config(steps=3)
    _, progress, _ = tiny.run(tmp_path, c, grade=tiny.by_pattern([MIXED]))
    got = rows(tmp_path)
    assert [r["step"] for r in got] == [1, 2, 3] and [r["rollouts_total"] for r in got] == [16, 32, 48]
    sampled = [pq.read_table(p).to_pydict() for p in sorted((tmp_path / "samples").glob("*.parquet"))]
    assert got[-1]["tokens_generated_total"] == sum(sum(s["response_tokens"]) for s in sampled)
    assert progress.position == 12 and progress.step == 3
    assert set(sampled[0]["group_id"]) == {0, 1, 2, 3} and got[0]["accuracy/train"] == 0.5
    keys = (
        "loss grad_norm update_norm learning_rate entropy mismatch/mean time/sample time/grade time/replay time/update time/step"
    )
    assert all(isinstance(got[0][k], float) for k in keys.split()) and got[0]["weight/mean"] is None
    assert 0 <= got[0]["mismatch/mean"] < 1e-5


def test_overlong_rows_stay_in_the_baseline_and_leave_the_loss(tmp_path):
    _, seen, _ = go(tmp_path, tiny.config(steps=1, loss__overlong="mask"), tiny.by_pattern([MIXED]))
    batch, ended = seen[0][1], pq.read_table(tmp_path / "samples" / "000001.parquet")["ended"].to_pylist()
    assert not all(ended)
    np.testing.assert_array_equal(batch.token_mask.any(axis=1), ended)
    assert batch.sampled_mask.any(axis=1).all()


def test_a_first_step_whose_rows_are_all_overlong_is_no_mismatch(tmp_path):
    """grpo keeps the slots, overlong masking leaves no token of theirs: nothing was compared, nothing is refused."""
    c = tiny.config(steps=1, algorithm__name="grpo", loss__overlong="mask", sample__max_response_tokens=1)
    parts = tiny.parts(tmp_path, c, grade=tiny.by_pattern([MIXED]))
    parts = dataclasses.replace(parts, collect=dataclasses.replace(parts.collect, sample=endless(parts.collect.sample)))
    train.loop(parts, tiny.state(parts.built), tiny.Progress())
    assert rows(tmp_path)[0]["mismatch/mean"] is None and rows(tmp_path)[0]["update/skipped"] == 1


def endless(sample):
    def cut(params, prompts, key, *, version):
        return dataclasses.replace(r := sample(params, prompts, key, version=version), ended=np.zeros_like(r.ended))

    return cut


def test_ten_dead_steps_stop_the_run(tmp_path):
    tmp_path.mkdir(exist_ok=True)
    with pytest.raises(UserError, match="step 3: 3 steps in a row without one effective group"):
        tiny.run(tmp_path, tiny.config(steps=9, algorithm__dead_steps=3), grade=tiny.by_pattern([["all wrong"] * 4]))


def test_a_broken_verifier_stops_the_run_by_name(tmp_path):
    def grade(jobs):
        return [Verdict(float("nan"), float("nan"), "verifier error: KeyError: 'nums'")] * len(jobs)

    with pytest.raises(UserError, match=re.compile(r"verifier of task countdown failed on 16 of 16.*countdown-\w+.*KeyError")):
        tiny.run(tmp_path, tiny.config(), grade=grade)


def test_a_sampler_that_disagrees_with_the_trainer_is_refused(tmp_path):
    parts = tiny.parts(tmp_path, tiny.config(), grade=tiny.by_pattern([MIXED]))
    real = parts.collect.sample

    def off(params, prompts, key, *, version):
        r = real(params, prompts, key, version=version)
        return dataclasses.replace(r, logp=np.where(r.sampled_mask, r.logp + 0.01, 0).astype(np.float32))

    parts = dataclasses.replace(parts, collect=dataclasses.replace(parts.collect, sample=off))
    with pytest.raises(UserError, match="sampler and trainer must agree"):
        train.loop(parts, tiny.state(parts.built), tiny.Progress())


def test_losses_that_stay_not_finite_stop_the_run(tmp_path):
    parts = tiny.parts(tmp_path, tiny.config(steps=9), grade=tiny.by_pattern([MIXED]))
    real = parts.built.train_step

    def poisoned(state, batch: Batch):
        return real(state, batch._replace(adv=batch.adv * np.nan))

    parts = dataclasses.replace(parts, built=dataclasses.replace(parts.built, train_step=poisoned))
    with pytest.raises(UserError, match="step 3: loss or gradient was not finite in 3 steps"):
        train.loop(parts, tiny.state(parts.built), tiny.Progress())


def test_a_stop_wish_ends_the_loop_after_a_saved_step(tmp_path):
    parts = tiny.parts(tmp_path, tiny.config(steps=9, checkpoint__every=100), grade=tiny.by_pattern([MIXED]))
    saved, asked = [], []
    parts = dataclasses.replace(
        parts,
        save=lambda state, progress, score: saved.append((int(state.step), progress.step, len(parts.buffer))),
        stopping=lambda: asked.append(1) or len(asked) >= 3,
    )
    _, progress = train.loop(parts, tiny.state(parts.built), tiny.Progress())
    assert saved == [(2, 2, 8)] and progress.step == 2  # checkpoint k contains store(k)


def test_stored_groups_expire_by_the_version_after_the_update(tmp_path):
    """After update n the buffer holds groups of age max_age at most; one update later they are gone."""
    c = tiny.config(steps=4, replay__max_age=2)
    sizes = []
    go(tmp_path, c, tiny.by_pattern([MIXED, ["all wrong"] * 4]))
    sizes = [r["replay/size"] for r in rows(tmp_path)]
    assert sizes == [4, 4, 0, 0]


def test_reference_log_probs_are_stored_with_the_group(tmp_path):
    """With a KL term, logp_ref is computed while a group is fresh, and a replayed slot brings its own."""
    c = tiny.config(steps=2, loss__kl_coef=0.1)
    parts = tiny.parts(tmp_path, c, grade=tiny.by_pattern([MIXED, TABLE]))
    b = parts.built
    start = tiny.state(b)
    reference = jax.tree.map(lambda x: x * 1.01, jax.tree.map(np.asarray, start.params))
    score = reference_scorer(lambda tokens: b.score(reference, tokens), c.row_tokens, c.rows)
    parts, seen = spied(dataclasses.replace(parts, collect=dataclasses.replace(parts.collect, reference=score)))
    train.loop(parts, start, tiny.Progress())
    (_, first, _), (_, batch, out) = seen
    expected = np.where(batch.sampled_mask, b.score(reference, batch.tokens), 0)
    np.testing.assert_allclose(batch.logp_ref, expected, atol=1e-5)
    np.testing.assert_array_equal(batch.logp_ref[4:8], first.logp_ref[:4])
    assert all(g.logp_ref is not None for g in parts.buffer) and np.isfinite(out.metrics["loss"])


def test_a_first_step_without_a_fresh_row_is_no_mismatch(tmp_path):
    """A loop that starts, as after a resume, with every slot replayed."""
    parts = tiny.parts(tmp_path, tiny.config(steps=3), grade=tiny.by_pattern([MIXED, ["all wrong"] * 4]))
    state, progress = train.loop(stopped(parts, 1), tiny.state(parts.built), tiny.Progress())
    assert progress.step == 1
    _, progress = train.loop(parts, state, progress)
    assert progress.step == 3 and rows(tmp_path)[1]["replay/filled"] == 4 and rows(tmp_path)[1]["mismatch/mean"] is None


def stopped(parts: train.Parts, after: int) -> train.Parts:
    """The parts, with a wish to stop after so many steps."""
    asked = iter([False] * after + [True])
    return dataclasses.replace(parts, stopping=lambda: next(asked))


@pytest.mark.parametrize("kw", [{"sample__top_p": 0.9}, {"sample__top_k": 5}])
def test_grpo_may_sample_with_top_p_or_top_k(tmp_path, kw):
    c = tiny.config(steps=1, algorithm__name="grpo", **kw)
    _, progress, _ = tiny.run(tmp_path, c, grade=tiny.by_pattern([MIXED]))
    assert progress.step == 1 and rows(tmp_path)[0]["mismatch/mean"] > 1e-3


def test_a_stop_before_the_first_step_saves_step_0_and_samples_nothing(tmp_path):
    parts = tiny.parts(tmp_path, tiny.config(), grade=lambda _: pytest.fail("sampled"))
    saved = []
    parts = dataclasses.replace(parts, save=lambda s, p, _: saved.append(p.step), stopping=lambda: True)
    assert train.loop(parts, tiny.state(parts.built), tiny.Progress())[1].step == 0 and saved == [0]


def test_ids_stay_unique_when_a_resumed_run_takes_fewer_prompts(tmp_path):
    parts = tiny.parts(tmp_path, tiny.config(steps=2), grade=tiny.by_pattern([MIXED]))
    state, progress = train.loop(parts, tiny.state(parts.built), tiny.Progress())
    c = tiny.config(steps=6, batch__prompts=2)
    fewer = tiny.parts(tmp_path, c, grade=tiny.by_pattern([["mixed"] * 2]))
    fewer = dataclasses.replace(fewer, buffer=parts.buffer)
    train.loop(fewer, state, progress)
    ids = [g for p in (tmp_path / "samples").glob("*.parquet") for g in set(pq.read_table(p)["group_id"].to_pylist())]
    assert len(ids) == len(set(ids)) == 2 * 4 + 4 * 2


def test_extra_slots_train_on_stored_groups_alone(tmp_path):
    """Step 1 has nothing stored: both extra slots are empty and nothing of them counts. Step 2 fills 2 dead and 2 extra."""
    c = tiny.config(steps=2, replay__extra=2, batch__mini_batches=2)
    _, seen, parts = go(tmp_path, c, tiny.by_pattern([MIXED, TABLE]))
    (_, first, out0), (_, batch, _) = seen
    G = c.batch.group_size
    assert first.tokens.shape[0] == 6 * G and not first.token_mask[4 * G :].any()
    np.testing.assert_array_equal(batch.fresh.reshape(6, G).all(axis=1), [True, False, True, False, False, False])
    for slot, source in ((1, 0), (3, 1), (4, 2), (5, 3)):
        own = slice(slot * G, (slot + 1) * G), slice(source * G, (source + 1) * G)
        np.testing.assert_array_equal(batch.tokens[own[0]], first.tokens[own[1]])
        np.testing.assert_array_equal(batch.logp_behav[own[0]], out0.logp_start[own[1]])
        assert batch.token_mask[own[0]].any()
    assert [(r["replay/filled"], r["replay/unfilled"]) for r in rows(tmp_path)] == [(0, 2), (4, 0)]
    assert [r["rollouts_total"] for r in rows(tmp_path)] == [4 * G, 8 * G]
    assert [g.id for g in parts.buffer] == [0, 1, 2, 3, 4, 6]


def test_empty_extra_slots_change_nothing(tmp_path):
    """One step, whose buffer is empty: parameters as without the extra slots, but for the order of sums."""
    ends = [go(tmp_path / str(n), tiny.config(steps=1, replay__extra=n), tiny.by_pattern([TABLE]))[0] for n in (0, 2)]
    for a, b in zip(jax.tree.leaves(ends[0].params), jax.tree.leaves(ends[1].params), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-4)  # the first AdamW step is a sign times 1e-2


def test_mopps_takes_the_prompts_it_knows_to_be_mixed(tmp_path):
    """4 prompts in the data, 8 candidates a step, 4 taken: after a few steps those that are always mixed are preferred."""
    task = {"name": "countdown", "countdown": {"train_problems": 4, "eval_problems": 16}}
    c = tiny.config(steps=12, tasks=[task], selection__method="mopps", selection__candidates=2, selection__decay=1.0)
    parts = tiny.parts(tmp_path, c)
    ids = [parts.collect.prompts(0, 4)[i].id for i in range(4)]
    mixed = set(ids[:2])
    asked: list[list[str]] = []

    real = parts.collect

    def collect(params, step, position):
        prompts, *_ = real._next(position, 4, step, 0)  # the same draws as the real call's
        asked.append([p.id for p in prompts])
        kinds = ["mixed" if p.id in mixed else "all wrong" for p in prompts]
        return dataclasses.replace(real, grade=tiny.by_pattern([kinds]))(params, step, position)

    parts = dataclasses.replace(parts, collect=collect)
    _, progress = train.loop(parts, tiny.state(parts.built), tiny.Progress())
    assert progress.position == 12 * 8 and parts.selection.observed >= 3
    late = [id_ in mixed for step in asked[6:] for id_ in step]
    assert np.mean(late) > 0.8
    out = rows(tmp_path)
    assert out[0]["selection/seen"] < 1 and out[-1]["selection/seen"] == 1 and out[-1]["selection/error"] < 0.2
    assert out[-1]["rollouts_total"] == 12 * 4 * c.batch.group_size


WORDS = {
    "tasks": [{"name": "math", "math": {"train_problems": 64, "eval_problems": 16, "steps": 1, "high": 9, "instruction": ""}}],
    "sample__max_prompt_tokens": 64,
    "verifier__workers": 2,
}


def test_mathematics_is_graded_by_workers_in_the_real_loop(tmp_path):
    """From the thread that collects the next step beside the update; the policy's nonsense has verdicts with reasons."""
    c = tiny.config(steps=3, algorithm__name="grpo", **WORDS)
    with Graders(c) as grade:
        _, seen, _ = go(tmp_path, c, grade)
    assert len(seen) == 3 and [r["step"] for r in rows(tmp_path)] == [1, 2, 3]
    table = pq.read_table(tmp_path / "samples" / "000003.parquet").to_pydict()
    assert len(table["reason"]) == 16 and set(table["reason"]) <= {"right", "wrong", "no answer"}
    assert rows(tmp_path)[-1]["groups/invalid"] == 0


def test_a_verifier_that_hangs_and_one_that_ends_cost_their_own_samples_only(tmp_path, monkeypatch):
    """By the text's length: a third hangs, a third ends the worker, the rest is right or wrong. No row is lost, none is NaN."""
    (tmp_path / "hostile.py").write_text(
        "import os\n"
        "def grade(text, *, nums, target):\n"
        "    kind = sum(map(ord, text)) % 8\n"
        "    if kind == 0:\n"
        "        while True: pass\n"
        "    if kind == 1:\n"
        "        os._exit(1)\n"
        "    return kind % 2\n"
    )
    monkeypatch.chdir(tmp_path)
    task = {"verifier": "hostile:grade", "countdown": {"train_problems": 64, "eval_problems": 16}}
    c = tiny.config(steps=2, tasks=[task], verifier__workers=2, verifier__seconds=0.4)
    with Graders(c) as grade:
        go(tmp_path / "run", c, grade)
    for step in ("000001", "000002"):
        table = pq.read_table(tmp_path / "run" / "samples" / f"{step}.parquet").to_pydict()
        kinds = [sum(map(ord, t)) % 8 for t in table["text"]]
        told = {0: "timeout", 1: "worker exited (code 1)"}
        assert table["reason"] == [told.get(k, "right" if k % 2 else "wrong") for k in kinds]
        assert table["score"] == [float(k % 2) if k > 1 else 0.0 for k in kinds]
        assert len(set(kinds)) > 3
    assert rows(tmp_path / "run")[-1]["groups/invalid"] == 0


def test_thinking_that_the_template_opened_is_kept_apart(tmp_path):
    """R1's manner: a response that never closes it is unfinished, one that does is graded by what follows."""
    tokenizer = tokenizers.load(chatty.save(tmp_path / "policy", chatty.MANNERS["r1"]))
    lines = [json.dumps({"problem": f"{i} + {7 - i}?", "answer": "7"}) for i in range(8)]
    for name in ("train", "eval"):
        half = lines[:4] if name == "train" else lines[4:]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(half) + "\n")
    files = {"train_file": str(tmp_path / "train.jsonl"), "eval_file": str(tmp_path / "eval.jsonl")}
    task = {"name": "math", "math": {"instruction": ""}} | files
    c = tiny.config(steps=1, tasks=[task], chat__system="Reason.", sample__max_prompt_tokens=40)
    said = {
        "It is \\boxed{7}.": "unfinished thinking",
        "8?</think>\\boxed{7}": "right",
        "7!</think>\\boxed{8}": "wrong",
        "</think>7<think>": "unfinished thinking",
    }
    texts = itertools.cycle(said)
    parts = tiny.parts(tmp_path / "run", c, tokenizer=tokenizer)
    parts = dataclasses.replace(parts, collect=dataclasses.replace(parts.collect, decode=lambda _: next(texts)))
    (tmp_path / "run").mkdir()
    train.loop(parts, tiny.state(parts.built), tiny.Progress())
    sampled = pq.read_table(tmp_path / "run" / "samples" / "000001.parquet").to_pylist()
    assert [(r["text"], r["reason"]) for r in sampled] == list(said.items()) * 4
    assert {r["prompt"] for r in sampled} == {chatty.r1(f"{i} + {7 - i}?", "Reason.") for i in range(4)}
    assert all(r["prompt_tokens"] == len(tokenizer.encode(r["prompt"])) and r["signal"] == "effective" for r in sampled)
