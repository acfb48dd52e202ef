"""Filled slots -> one batch of fixed shape, through grain. Host arrays; whoever calls places them on devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np

from popo_jax.scenes import Images
from popo_jax.types import FillPlan, Group, UserError


class Stored(Protocol):
    """Where replayed groups come from: a replay buffer, or a dict."""

    def __getitem__(self, id: int, /) -> Group: ...


@dataclass(frozen=True, eq=False)
class Slot:
    """One filled place of a batch."""

    group: Group
    counted: bool
    replayed: bool


@dataclass(frozen=True, eq=False)
class FilledSlots:
    """A grain RandomAccessDataSource of a plan's places, in order: each slot's own group, or the stored one planned for it.

    An extra slot (beyond the P groups) that the plan leaves empty shows group s mod P; it is not counted.
    """

    groups: Sequence[Group]
    plan: FillPlan
    stored: Stored

    def __len__(self) -> int:
        return len(self.plan.source)

    def __getitem__(self, s: int) -> Slot:
        replayed = bool(self.plan.source[s] >= 0)
        group = self.stored[int(self.plan.source[s])] if replayed else self.groups[s % len(self.groups)]
        return Slot(group, bool(self.plan.counted[s]), replayed)


def assemble(
    groups: Sequence[Group],
    plan: FillPlan,
    stored: Stored,
    *,
    T: int,
    marked_fresh: bool,
    shown: Callable[[Sequence[Group]], Images] | None = None,
) -> dict[str, Any]:
    """The fields of a Batch: tokens i32, sampled_mask, token_mask bool, logp_behav, logp_sampler f32 [P*G, T]; adv f32,
    fresh bool, version i32 [P*G]; logp_ref f32 [P*G, T] if this step's own groups carry it; images [P*G, ..] if `shown` says what
    the rows of some groups see.

    Row s * G + g is response g of slot s: prompt, response, padding 0, from column 0. `logp_behav` is 0 on fresh rows;
    a slot that is not counted has token_mask False. `marked_fresh` makes replayed rows pass for fresh ones (popo-pi-old).
    Errors: ValueError for a row longer than T, which nothing truncates, or groups of different sizes; UserError for a
    stored group without logp_ref in a step that has it.
    """
    with_ref = groups[0].logp_ref is not None

    def lay_out(slots: Sequence[Slot]) -> dict[str, Any]:
        rows: dict[str, Any] = _lay_out(slots, T=T, marked_fresh=marked_fresh, with_ref=with_ref)
        return rows if shown is None else rows | {"images": shown([slot.group for slot in slots])}

    return grain.MapDataset.source(FilledSlots(groups, plan, stored)).batch(len(plan.source), batch_fn=lay_out)[0]


def _lay_out(slots: Sequence[Slot], *, T: int, marked_fresh: bool, with_ref: bool) -> dict[str, np.ndarray]:
    """All rows of a batch at once: one scatter for each field."""
    groups, G = [slot.group for slot in slots], len(slots[0].group.lengths)
    _check(groups, G, T, with_ref)
    used = np.arange(T) < np.concatenate([g.lengths for g in groups])[:, None]
    fresh = np.repeat([marked_fresh or not slot.replayed for slot in slots], G)
    counted = np.repeat([slot.counted for slot in slots], G)

    def scatter(values: Sequence[Any], dtype: type, where: np.ndarray = used) -> np.ndarray:
        out: np.ndarray = np.zeros(used.shape, dtype)
        if values:
            out[where] = np.concatenate(values)
        return out

    behav = [slot.group.logp_behav for slot in slots if slot.replayed and not marked_fresh]
    out: dict[str, np.ndarray] = {
        "tokens": scatter([g.tokens for g in groups], np.int32),
        "sampled_mask": scatter([g.sampled_mask for g in groups], np.bool_),
        "token_mask": scatter([g.token_mask for g in groups], np.bool_) & counted[:, None],
        "logp_behav": scatter(behav, np.float32, used & ~fresh[:, None]),
        "logp_sampler": scatter([g.logp_sampler for g in groups], np.float32),
        "adv": np.concatenate([g.adv for g in groups]).astype(np.float32, copy=False),
        "fresh": fresh,
        "version": np.repeat(np.array([g.version for g in groups], np.int32), G),
    }
    return out | ({"logp_ref": scatter([g.logp_ref for g in groups], np.float32)} if with_ref else {})


def _check(groups: Sequence[Group], G: int, T: int, with_ref: bool) -> None:
    for s, g in enumerate(groups):
        if len(g.lengths) != G or g.lengths.max() > T:
            rows = f"{len(g.lengths)} rows of up to {g.lengths.max()} tokens"
            raise ValueError(f"group {g.id} in slot {s} must have {G} rows of at most {T} tokens, got {rows}")
        if with_ref and g.logp_ref is None:
            raise UserError(
                f"group {g.id} of the replay buffer must carry log-probs of the reference policy for loss.kl_coef above 0, "
                f"got none: it was stored by a run without them"
            )
