from __future__ import annotations

import numpy as np
import pytest

from popo_jax.rl.rollout import choose_slots, cut, grade_groups, lay_out, overall, signal_of
from popo_jax.types import Prompt, Responses, Verdict
from tests import tiny

G, R = 4, 3
PROMPTS = [Prompt(f"p{i}", "countdown", "x", np.arange(5, 7 + i, dtype=np.int32), {}) for i in range(2)]


def graded(scores, correct=None, *, overlong="keep", ended=None, kind="grpo"):
    """Two groups of four with these scores; response j of a group has 1 + j % 3 tokens."""
    n = 1 + np.arange(2 * G) % R
    mask = np.arange(R) < n[:, None]
    rng = np.random.default_rng(0)
    responses = Responses(
        np.where(mask, rng.integers(20, 90, mask.shape), 0).astype(np.int32),
        mask,
        np.where(mask, -1.0, 0).astype(np.float32),
        np.ones(2 * G, bool) if ended is None else np.array(ended),
        version=3,
    )
    correct = scores if correct is None else correct
    verdicts = [Verdict(float(s), float(k), "r") for s, k in zip(scores, correct, strict=True)]
    c = tiny.config(loss__overlong=overlong, algorithm__advantages=kind)
    return responses, grade_groups(PROMPTS, responses, lambda _: verdicts, lambda ids: str(list(ids)), c=c, ids=[10, 11])


def test_groups_are_ragged_rows_of_prompt_and_response():
    responses, groups = graded([1, 0, 0, 1, 0, 0, 0, 0])
    assert [g.id for g in groups] == [10, 11] and [g.version for g in groups] == [3, 3]
    for p, g in enumerate(groups):
        n = len(PROMPTS[p].tokens)
        assert g.lengths.tolist() == [n + int(k) for k in responses.sampled_mask[p * G : (p + 1) * G].sum(axis=1)]
        rows = np.split(g.tokens, np.cumsum(g.lengths)[:-1])
        masks = np.split(g.sampled_mask, np.cumsum(g.lengths)[:-1])
        for i, (row, mask) in enumerate(zip(rows, masks, strict=True)):
            k = len(row) - n
            np.testing.assert_array_equal(row, [*PROMPTS[p].tokens, *responses.tokens[p * G + i, :k]])
            np.testing.assert_array_equal(mask, [False] * n + [True] * k)
    laid = lay_out(groups, 12, 10)
    assert laid.shape == (10, 12) and not laid[8:].any()
    np.testing.assert_array_equal(cut(laid[G : 2 * G], groups[1]), groups[1].tokens)


def test_signals():
    _, groups = graded([1, 0, 0, 1, 1, 1, 1, 1])
    assert [g.signal for g in groups] == ["effective", "all_right"]
    _, groups = graded([0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5])
    assert [g.signal for g in groups] == ["all_wrong", "invalid"]


def test_format_credit_makes_no_group_effective():
    scores, correct = [0.1, 0, 0.1, 0, 1, 0.1, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0]
    _, groups = graded(scores, correct)
    assert [g.signal for g in groups] == ["all_wrong", "effective"]
    assert (groups[0].adv != 0).all()  # grpo trains on them all the same
    assert signal_of(groups[0], by="score") == "effective"


def test_a_group_whose_counted_rows_have_no_advantage_is_not_effective():
    """Rows that overlong masking drops carry no gradient: here every row."""
    _, groups = graded([1, 0, 0, 1, 1, 0, 0, 1], overlong="mask", ended=[False] * 4 + [True] * 4)
    assert [g.signal for g in groups] == ["invalid", "effective"]
    assert not groups[0].token_mask.any() and groups[0].sampled_mask.any() and (groups[0].adv != 0).all()


def test_one_broken_verdict_in_many_makes_its_group_invalid():
    from popo_jax.rl import rollout

    scores = [float("nan"), 0, 1, 0, 1, 0, 0, 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "MAX_VERIFIER_ERRORS", 0.2)
        _, groups = graded(scores)
    assert [g.signal for g in groups] == ["invalid", "effective"] and (groups[0].adv == 0).all()
    m = overall(groups)
    assert m["groups/invalid"] == 0.5 and m["accuracy/train"] == pytest.approx(3 / 7)


@pytest.mark.parametrize(("kind", "first"), [("grpo", 0.8660229), ("dr_grpo", 0.5), ("rloo", 2 / 3)])
def test_advantages_are_of_the_chosen_kind(kind, first):
    _, groups = graded([1, 0, 0, 1, 0, 0, 0, 0], kind=kind)
    assert groups[0].adv[0] == pytest.approx(first, abs=1e-5) and (groups[1].adv == 0).all()


def test_choose_slots_keeps_the_order_and_drops_the_surplus():
    _, (good, bad) = graded([1, 0, 0, 1, 0, 0, 0, 0])
    assert choose_slots([bad, good, bad, good, good], 2) == [good, good]
    assert choose_slots([bad, good, bad], 2) == [bad, good]
