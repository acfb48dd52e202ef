"""What fills a batch's slots: a plan made from the buffer as it stands before the step, one rule for every preset."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from popo_jax.config import Preset
from popo_jax.replay.buffer import Buffer
from popo_jax.replay.priority import best_first, newest_first, priorities
from popo_jax.types import FillPlan, Group

REPLAY = 0x5265706C
"""Sets the draws of proportional selection apart from every other use of the seed."""


def fill(
    buffer: Buffer,
    groups: Sequence[Group],
    *,
    version: int,
    preset: Preset,
    seed: int,
    step: int,
    extra: int = 0,
    divergence: Mapping[int, float] | None = None,
) -> FillPlan:
    """Plan the slots of a batch whose P fresh groups are `groups`; adds 1 to the times used of what it replays.

    `extra` more slots follow the P, ineffective by themselves, so only a preset that replays has any (ours, not the paper's).

    Effective groups stay. The ineffective slots: `keep` counts them; `mask` and `resample` (whatever its rounds left
    empty) give them zero weight; `replay` gives them, in slot order, the best stored groups in the preset's order, none
    twice, and zero weight where none is left. Usable is what has min_age <= age <= max_age and uses < max_uses;
    age = version - group.version, `version` the updates applied so far. `divergence`, for order `kl`, maps the ids of
    the scored groups to their distance from the current policy.
    """
    counted = np.array([g.effective or preset.slots == "keep" for g in groups] + [False] * extra, bool)
    source, age = np.full(len(counted), -1, np.int64), np.zeros(len(counted), np.int32)
    if preset.slots == "replay":
        pool = _Pool(buffer, usable(buffer, version=version), version, seed, step, divergence)
        empty = np.flatnonzero(~counted)
        chosen = ORDERS[preset.order](pool)[: len(empty)]
        slots = empty[: len(chosen)]
        source[slots] = [g.id for g in chosen]
        age[slots] = [version - g.version for g in chosen]
        counted[slots] = True
        buffer.use(g.id for g in chosen)
    return FillPlan(source, counted, age)


def to_store(groups: Sequence[Group], preset: Preset) -> list[int]:
    """Slots whose fresh group goes into the buffer after the step, ascending."""
    if preset.stores == "nothing":
        return []
    return [s for s, g in enumerate(groups) if g.effective or preset.stores == "all"]


def usable(buffer: Buffer, *, version: int) -> list[Group]:
    """Stored groups that may be replayed at `version`, in storing order."""
    c = buffer.c
    return [g for g in buffer if c.min_age <= version - g.version <= c.max_age and buffer.uses(g.id) < c.max_uses]


def candidates(buffer: Buffer, *, version: int, n: int) -> list[Group]:
    """The n newest usable groups, newest first: those popo-kl scores."""
    groups = usable(buffer, version=version)
    return [groups[i] for i in newest_first(groups, _uses(buffer, groups))[:n]]


def digest(plan: FillPlan) -> str:
    """SHA-256 of the plan, equal on every process that holds the same buffer."""
    sha = hashlib.sha256()
    for values, dtype in ((plan.source, "<i8"), (plan.counted, "?"), (plan.age, "<i4")):
        sha.update(f"{dtype}{values.shape}".encode() + np.ascontiguousarray(values, dtype).tobytes())
    return sha.hexdigest()


@dataclass(frozen=True, eq=False)
class _Pool:
    """What an order chooses from."""

    buffer: Buffer
    groups: list[Group]
    version: int
    seed: int
    step: int
    divergence: Mapping[int, float] | None

    def pick(self, indices: np.ndarray) -> list[Group]:
        return [self.groups[i] for i in indices]


def _by_priority(pool: _Pool) -> list[Group]:
    c = pool.buffer.c
    ranked = pool.pick(best_first(pool.groups, _uses(pool.buffer, pool.groups), c, version=pool.version))
    if c.selection == "top":
        return ranked
    rng = np.random.default_rng([pool.seed, REPLAY, pool.step])
    return [ranked[i] for i in _draw(priorities(ranked, c, version=pool.version), rng)]


def _by_recency(pool: _Pool) -> list[Group]:
    return pool.pick(newest_first(pool.groups, _uses(pool.buffer, pool.groups)))


def _by_divergence(pool: _Pool) -> list[Group]:
    """Lowest first, newest first among equals; a group without a finite score is no candidate."""
    if pool.divergence is None:
        raise ValueError("order kl must be given the divergence of its candidates")
    scores = pool.divergence
    scored = [g for g in _by_recency(pool) if np.isfinite(scores.get(g.id, np.nan))]
    return sorted(scored, key=lambda g: scores[g.id])


ORDERS: Mapping[str, Callable[[_Pool], list[Group]]] = {
    "priority": _by_priority,
    "newest": _by_recency,
    "kl": _by_divergence,
}


def _draw(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A whole order drawn without replacement in proportion to `weights`; those of weight 0 last, as they stand.

    Exponential clocks of rate w_i ring in that order (Efraimidis and Spirakis 2006).
    """
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return np.argsort(rng.exponential(size=len(weights)) / weights, kind="stable")


def _uses(buffer: Buffer, groups: Sequence[Group]) -> list[int]:
    return [buffer.uses(g.id) for g in groups]
