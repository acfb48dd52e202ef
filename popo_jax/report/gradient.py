"""Which sampled responses an update was made from, in their own step and by replay."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from popo_jax.report.read import Run
from popo_jax.report.slices import number

KEEPS = ("grpo",)
"""Algorithms that train on ineffective groups, too."""


@dataclass(frozen=True, eq=False)
class Uses:
    """Of every row of run.samples: how often it bore a gradient. Rows with advantage 0 never do."""

    fresh: np.ndarray
    """int64 [n], 0 or 1: in its own step."""
    replayed: np.ndarray
    """int64 [n]: in later steps."""
    group: np.ndarray
    """int64 [n], number of its group."""
    lost: int
    """Replays of groups whose samples are not there."""

    @cached_property
    def total(self) -> np.ndarray:
        return self.fresh + self.replayed


def uses(run: Run) -> Uses:
    """A group is a step and a group_id. It is trained on in its own step when its signal is effective (grpo: whatever it is;
    dapo: when it is among the first `batch.prompts` effective ones), and in each step whose replays list it. With
    loss.overlong mask, rows that the limit cut bear none.
    """
    s = run.samples
    step, id_ = s["step"].to_numpy(), _whole(s["group_id"])
    span = int(max([0, *step[-1:], *run.replays["step"].to_numpy()[-1:]])) + 1
    groups, group = np.unique(id_ * span + step, return_inverse=True)
    bears = np.abs(np.nan_to_num(number(s["advantage"]))) > 0
    if run.setting("loss.overlong") == "mask":
        bears &= pc.fill_null(s["ended"], True).to_numpy()
    known = id_ >= 0
    effective = pc.fill_null(pc.equal(s["signal"], "effective"), False).to_numpy()
    fresh = effective if run.setting("algorithm.name") not in KEEPS else np.ones(len(step), bool)
    if run.setting("algorithm.name") == "dapo":
        fresh = fresh & _first_effective(run, group, effective, step)
    times, lost = _replayed(run, groups, span)
    replayed = times[group]
    return Uses((bears & fresh).astype(np.int64), np.where(bears & known, replayed, 0), group, lost)


def _whole(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(pc.fill_null(column, -1).to_numpy(), np.int64)


def _first_effective(run: Run, group: np.ndarray, effective: np.ndarray, step: np.ndarray) -> np.ndarray:
    """bool [n]: rows of the first `batch.prompts` effective groups of their step, in the order in which they were sampled."""
    room = run.setting("batch.prompts")
    if not isinstance(room, int) or not len(group):
        return np.ones(len(group), bool)
    _, at = np.unique(group, return_index=True)
    at = np.sort(at[effective[at]])
    _, start = np.unique(step[at], return_index=True)
    rank = np.arange(len(at)) - np.repeat(start, np.diff([*start, len(at)]))
    return np.isin(group, group[at[rank < room]])


def _replayed(run: Run, groups: np.ndarray, span: int) -> tuple[np.ndarray, int]:
    """([groups] times replayed, replays whose group is unknown), of groups id * span + step, ascending.

    A replay means the last group of that id sampled before it.
    """
    times, r = np.zeros(len(groups), np.int64), run.replays
    id_, step = _whole(r["group_id"]), r["step"].to_numpy()
    if not len(groups):
        return times, len(id_)
    at = np.searchsorted(groups, id_ * span + step) - 1
    there = (at >= 0) & (id_ >= 0) & (groups[np.maximum(at, 0)] // span == id_)
    np.add.at(times, at[there], 1)
    return times, int((~there).sum())
