"""Stored groups in the order they came, and how often each was used: the one mutable thing in the room."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from popo_jax.config import ReplayConfig
from popo_jax.replay.priority import best_first
from popo_jax.types import Group, UserError

_SCALAR = {"id": np.int64, "version": np.int64, "prompt_id": np.str_, "task": np.str_, "signal": np.str_}
_PER_ROW = {"lengths": np.int32, "score": np.float32, "correct": np.float32, "adv": np.float32, "ended": np.bool_}
_PER_TOKEN = {
    "tokens": np.int32,
    "sampled_mask": np.bool_,
    "token_mask": np.bool_,
    "logp_sampler": np.float32,
    "logp_behav": np.float32,
}


class Buffer:
    """At most `c.capacity` groups; iterates over them in storing order, `buffer[id]` is one of them.

    Within one version storing order is slot order: groups of a step are stored together, slots ascending.
    """

    def __init__(self, c: ReplayConfig):
        assert c.capacity is not None  # resolved
        self.c = c
        self.capacity: int = c.capacity
        self._groups: dict[int, Group] = {}
        self._uses: dict[int, int] = {}
        self.nbytes = 0
        """Of the groups' arrays. Images are not among them: a group has its prompt's id."""

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups.values())

    def __contains__(self, id: object) -> bool:
        return id in self._groups

    def __getitem__(self, id: int) -> Group:
        return self._groups[id]

    def uses(self, id: int) -> int:
        """How often the group was replayed."""
        return self._uses[id]

    def use(self, ids: Iterable[int]) -> None:
        """Add 1 to the times used of each."""
        for id_ in ids:
            self._uses[id_] += 1

    def store(self, groups: Sequence[Group], logp_start: np.ndarray, *, slots: Sequence[int], version: int) -> int:
        """Store this step's fresh groups, then evict; returns how many were refused for log-probs that are not finite.

        Group i came from slot `slots[i]` of the batch whose `logp_start` float32 [P*G, T] this is: response g of slot s is
        row s * G + g, position t speaks of token t. `version` is the current one, after this step's update. The cut of
        `logp_start` becomes the group's `logp_behav`, once and for good. An ineffective group (popo-ineff stores those
        too) was not trained on: its slot may hold another group's rows, so its behaviour log-probs are the sampler's.
        Texts and reasons are dropped.

        Errors: ValueError for an id that is stored already, or rows that `logp_start` does not hold.
        """
        refused = 0
        for slot, group in sorted(zip(slots, groups, strict=True), key=lambda pair: pair[0]):
            if group.id in self._groups:
                raise ValueError(f"group {group.id} is stored already")
            logp = _cut(logp_start, group, slot) if group.effective else group.logp_sampler.astype(np.float32)
            if not np.isfinite(logp[group.sampled_mask]).all():
                refused += 1
            elif self.capacity > 0:
                self._add(replace(group, logp_behav=logp, texts=(), reasons=()), uses=0)
        self._evict(version)
        return refused

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, as flat arrays of fixed dtypes without pickled objects, groups end to end in storing order.

        n groups: scalars, `uses`, `rows` (G of each) and `has_logp_ref` are [n]; per-row arrays [sum of rows]; per-token
        arrays [sum of lengths]; `logp_ref` only the tokens of groups that have it.
        Errors: TypeError for a group's field of another dtype than `Group` says.
        """
        groups = list(self)
        out: dict[str, np.ndarray] = {
            name: np.array([getattr(g, name) for g in groups], dtype) for name, dtype in _SCALAR.items()
        }
        out["uses"] = np.array(list(self._uses.values()), np.int64)
        out["rows"] = np.array([len(g.lengths) for g in groups], np.int64)
        out["has_logp_ref"] = np.array([g.logp_ref is not None for g in groups], np.bool_)
        for name, dtype in (_PER_ROW | _PER_TOKEN).items():
            out[name] = _join([getattr(g, name) for g in groups], dtype)
        return out | {"logp_ref": _join([g.logp_ref for g in groups if g.logp_ref is not None], np.float32)}

    @classmethod
    def from_arrays(cls, c: ReplayConfig, arrays: Mapping[str, np.ndarray]) -> Buffer:
        """The buffer `arrays` was made from, to the bit: order, times used, dtypes, absent reference log-probs.

        Errors: UserError if it holds more groups than `c.capacity`, lacks an array, or has counts that do not add up.
        """
        buffer, pieces = cls(c), _pieces(arrays)
        n = len(pieces["id"])
        if n > buffer.capacity:
            raise UserError(f"replay.capacity must hold the {n} groups of the stored buffer, got {buffer.capacity}")
        fields = (*_SCALAR, *_PER_ROW, *_PER_TOKEN)
        for i in range(n):
            ref = pieces["logp_ref"][i] if arrays["has_logp_ref"][i] else None
            buffer._add(Group(**{name: pieces[name][i] for name in fields}, logp_ref=ref), uses=pieces["uses"][i])
        return buffer

    def _add(self, group: Group, *, uses: int) -> None:
        assert group.logp_behav is not None
        group.logp_behav.flags.writeable = False
        self._groups[group.id], self._uses[group.id] = group, uses
        self.nbytes += _size(group)

    def _evict(self, version: int) -> None:
        """The expired go first, then the worst: with pure recency the oldest version, in it the most used, the last slot."""
        for group in [g for g in self if version - g.version > self.c.max_age or self._uses[g.id] >= self.c.max_uses]:
            self._drop(group)
        surplus = len(self) - self.capacity
        if surplus > 0:
            groups = list(self)
            order = best_first(groups, list(self._uses.values()), self.c, version=version)
            for i in order[len(groups) - surplus :]:
                self._drop(groups[i])

    def _drop(self, group: Group) -> None:
        del self._groups[group.id], self._uses[group.id]
        self.nbytes -= _size(group)


def _size(group: Group) -> int:
    return sum(x.nbytes for x in vars(group).values() if isinstance(x, np.ndarray))


def _cut(logp_start: np.ndarray, group: Group, slot: int) -> np.ndarray:
    """Flat float32 [N], a copy: the group's own rows and lengths out of [P*G, T]."""
    G, T = len(group.lengths), logp_start.shape[1]
    rows = logp_start[slot * G : (slot + 1) * G]
    if slot < 0 or len(rows) != G or group.lengths.max() > T:
        raise ValueError(
            f"group {group.id} of slot {slot} has {G} rows of up to {group.lengths.max()} tokens, logp_start {logp_start.shape}"
        )
    return rows[np.arange(T) < group.lengths[:, None]].astype(np.float32)


def _join(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(parts, dtype=dtype, casting="no") if parts else np.zeros(0, dtype)


def _pieces(arrays: Mapping[str, np.ndarray]) -> dict[str, list]:
    """Name -> one entry per group, arrays copied so that a dropped group frees its memory. Errors: as `from_arrays`."""
    scalars, per_row, per_token = (*_SCALAR, "uses", "rows", "has_logp_ref"), tuple(_PER_ROW), tuple(_PER_TOKEN)
    names = (*scalars, *per_row, *per_token, "logp_ref")
    if missing := [name for name in names if name not in arrays]:
        raise UserError(f"a stored replay buffer must hold the arrays {', '.join(names)}, got none named {', '.join(missing)}")
    n, rows = len(arrays["id"]), arrays["rows"].tolist()
    tokens = [int(part.sum()) for part in _split(arrays["lengths"], rows)]
    with_ref = [t if has else 0 for t, has in zip(tokens, arrays["has_logp_ref"], strict=False)]
    counts = dict.fromkeys(scalars, [1] * n) | dict.fromkeys(per_row, rows) | dict.fromkeys(per_token, tokens)
    counts["logp_ref"] = with_ref
    for name in names:
        expected, got = sum(counts[name]), len(arrays[name])
        if got != expected:
            raise UserError(f"array {name} of a stored replay buffer must have {expected} entries, got {got}")
    cut = {name: _split(arrays[name], counts[name]) for name in (*per_row, *per_token, "logp_ref")}
    return {name: arrays[name].tolist() for name in scalars} | cut


def _split(flat: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    ends = np.cumsum([0, *counts])
    return [flat[a:b].copy() for a, b in pairwise(ends)]
