"""What crosses a room on the host: prompts, responses, verdicts, groups, fill plans.

Plain numpy and strings, no device arrays, no jax. Shape letters: P prompts, G samples per prompt, R response
positions, N tokens of a group's rows laid end to end (prompt included), B = P * G rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

EPSILON = 1e-6
"""Rewards closer than this are equal. (np.std of seven 0.1 is 1.4e-17, so `std == 0` is no test.)"""

Signal = Literal["effective", "all_right", "all_wrong", "invalid"]


class UserError(ValueError):
    """Bad input, told in one sentence: what, where, expected, got. The command line prints it and exits 2."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """One problem, ready for the sampler."""

    id: str
    """Stable across runs and processes: made from the problem's content."""
    task: str
    text: str
    """What the policy reads, template applied."""
    tokens: np.ndarray
    """int32 [n], n >= 1."""
    answer: Mapping[str, Any]
    """Keyword fields of the task's `grade`."""
    begun: str = ""
    """What of the response stands in `text` already: `grade` reads it before what was sampled."""
    slices: Mapping[str, str] = field(default_factory=dict)
    """Values of the columns that the task's config names (`slices`)."""


@dataclass(frozen=True, eq=False)
class Responses:
    """What a sampler returns: row i = p * G + g is sample g of prompt p, column j is its j-th sampled token."""

    tokens: np.ndarray
    """int32 [B, R]; 0 after a row's end."""
    sampled_mask: np.ndarray
    """bool [B, R]: the model chose this token; the end token included."""
    logp: np.ndarray
    """float32 [B, R] under the sampling distribution; 0 where the mask is False."""
    ended: np.ndarray
    """bool [B]: the row's last token is an end token; False: cut by the limit."""
    version: int
    """Updates applied to the parameters that sampled."""


@dataclass(frozen=True)
class Verdict:
    """A verifier's answer. `score` is what advantages use; `correct` in [0, 1] decides what is effective."""

    score: float
    correct: float
    reason: str


@dataclass(frozen=True, eq=False)
class Group:
    """G graded responses to one prompt from one policy, rows stored ragged: row g is prompt then response.

    Per-token arrays are flat [N], the rows end to end in order; `lengths` [G] cuts them.
    """

    id: int
    """Unique in a run: counts groups in the order they were sampled."""
    prompt_id: str
    task: str
    version: int
    signal: Signal
    lengths: np.ndarray
    """int32 [G], prompt included."""
    tokens: np.ndarray
    """int32 [N]."""
    sampled_mask: np.ndarray
    """bool [N]."""
    token_mask: np.ndarray
    """bool [N]: sampled, and the row kept (overlong masking drops rows)."""
    logp_sampler: np.ndarray
    """float32 [N], 0 where not sampled."""
    score: np.ndarray
    """float32 [G]."""
    correct: np.ndarray
    """float32 [G]."""
    adv: np.ndarray
    """float32 [G], computed once, right after grading."""
    ended: np.ndarray
    """bool [G]."""
    logp_behav: np.ndarray | None = None
    """float32 [N]: `logp_start` of the step that first trained on the group. None while fresh."""
    logp_ref: np.ndarray | None = None
    """float32 [N] under the reference policy, if the loss has a KL term."""
    texts: tuple[str, ...] = ()
    """The decoded responses, fresh groups only."""
    reasons: tuple[str, ...] = ()
    """The verdicts' reasons, fresh groups only."""

    @property
    def effective(self) -> bool:
        return self.signal == "effective"


@dataclass(frozen=True, eq=False)
class FillPlan:
    """What fills each of a batch's P slots. Slot s trains on stored group `source[s]`, or its own where that is -1."""

    source: np.ndarray
    """int64 [P]: id of a stored group, -1 for the slot's own group."""
    counted: np.ndarray
    """bool [P]: False gives the slot zero weight (its token_mask is False)."""
    age: np.ndarray
    """int32 [P]: current version less the stored group's; 0 for own groups."""

    @property
    def replaced(self) -> np.ndarray:
        """bool [P]."""
        return self.source >= 0

    def digest(self) -> str:
        """16 hex digits, the same wherever the plan is."""
        parts = (np.ascontiguousarray(x).tobytes() for x in (self.source, self.counted, self.age))
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
