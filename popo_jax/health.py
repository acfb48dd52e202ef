"""Lines of a run's metrics beyond which experience says to worry, and what to do then, for the console and `popo report`.

A rule looks at the mean of a metric over the last rows that have it, so that one odd step is not a crossing. The limits are what
the runs of benchmarks/study (173 of five tasks) stayed within and broken ones did not; see each rule.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Rule:
    name: str
    """Stable: a report's findings have it."""
    key: str
    """Of metrics.jsonl."""
    when: Literal["above", "below"]
    limit: float
    says: str
    """What it means, with {value} and {limit}."""
    advice: str
    """What to do."""
    relative: bool = False
    """The limit is a multiple of the mean over the first `window` rows."""
    window: int = 10
    least: int = 5
    """Rows that must have the metric before anything is said."""
    unless: tuple[str, float] | None = None
    """(metric, value): silent while that metric's mean is at least the value."""


RULES: tuple[Rule, ...] = (
    Rule(
        "dead-verifier",
        "groups/all_wrong",
        "above",
        0.99,
        "nearly every group is all wrong ({value:.1%}): a verifier that accepts nothing looks like that, or a task far too hard",
        "read samples/: where right answers are graded wrong, mend the verifier or the prompt's format; else easier problems",
        least=5,
        window=5,
    ),
    Rule(
        "saturated",
        "groups/all_right",
        "above",
        0.95,
        "nearly every group is all right ({value:.1%}): nothing is left to learn here, or the verifier accepts anything",
        "read samples/: harder problems, or a stricter verifier",
    ),
    Rule(
        "no-signal",
        "groups/effective",
        "below",
        0.02,
        "next to no group carries a signal ({value:.1%} effective)",
        "problems nearer to what the policy can do half of the time; more responses a group; selection.method mopps",
    ),
    Rule(
        "entropy-collapse",
        "entropy",
        "below",
        0.1,
        "the entropy of the policy fell to {value:.3g} nats a token, under a tenth of what it began with ({limit:.3g})",
        "a lower optim.learning_rate, a higher loss.clip_high, loss.entropy_coef, or a KL term (loss.kl_coef)",
        relative=True,
    ),
    Rule(
        "staleness",
        "replay/age_mean",
        "above",
        8.0,
        "replayed groups are {value:.1f} updates old on average, under importance weights",
        "lower replay.max_age and replay.min_age, or clip around the behaviour policy (popo-plus)",
        unless=("weight/ess", 0.9999),
    ),
    Rule(
        "few-voices",
        "weight/ess",
        "below",
        0.3,
        "the weights of replayed rows leave an effective sample of {value:.0%} of their tokens",
        "lower replay.max_age or optim.learning_rate; weight.cap bounds what single tokens do",
    ),
    Rule(
        "capped-weights",
        "weight/capped",
        "above",
        0.1,
        "{value:.1%} of replayed tokens have a weight above the cap",
        "lower replay.max_age: the policy has moved away from what sampled these groups",
    ),
    Rule(
        "behaviour-drift",
        "kl/behaviour_replayed",
        "above",
        0.5,
        "the policy is {value:.2f} nats a token away from what sampled the replayed groups",
        "lower replay.max_age or optim.learning_rate",
    ),
    Rule(
        "proximal-drift",
        "kl/proximal",
        "above",
        0.3,
        "within one step the policy moves {value:.2f} nats a token away from where it began",
        "fewer batch.mini_batches or a lower optim.learning_rate",
    ),
    Rule(
        "clipped-fresh",
        "clip/low_fresh",
        "above",
        0.2,
        "{value:.1%} of fresh tokens are clipped: most of a step's later mini-batches do nothing",
        "fewer batch.mini_batches or a lower optim.learning_rate",
    ),
    Rule(
        "mismatch",
        "mismatch/mean",
        "above",
        0.03,
        "sampler and trainer disagree by {value:.3g} nats a token on the same tokens",
        "model.dtype float32 for a few steps tells whether rounding does it; else it is a defect worth a report",
    ),
    Rule(
        "gradient-spike",
        "grad_norm",
        "above",
        10.0,
        "the gradient's norm is {value:.3g}, over ten times what it began with ({limit:.3g})",
        "a lower optim.grad_clip or optim.learning_rate; look at the rows with the largest weights",
        relative=True,
        window=5,
    ),
    Rule(
        "nonfinite",
        "update/nonfinite",
        "above",
        0.0,
        "updates were not finite and not applied, up to {value:.0f} in a step",
        "a lower optim.learning_rate; model.dtype float32 to look for an overflow",
        window=1,
        least=1,
    ),
    Rule(
        "skipped-updates",
        "update/skipped",
        "above",
        0.9,
        "on average {value:.1f} mini-batches of a step had nothing to train on",
        "fewer batch.mini_batches, a larger replay.max_age, easier problems",
        window=20,
        least=20,
    ),
    Rule(
        "truncated",
        "response/truncated",
        "above",
        0.3,
        "{value:.0%} of responses are cut by the length limit",
        "a larger sample.max_response_tokens, or loss.overlong mask so that what was cut is not punished",
    ),
)
BY_KEY: Mapping[str, Rule] = {r.key: r for r in RULES}


@dataclass(frozen=True)
class Crossing:
    """A rule's line was crossed from step `first` to `last`."""

    rule: Rule
    first: int
    last: int
    steps: int
    """Rows beyond the line, at least 1."""
    worst: float
    """The mean farthest beyond it."""
    limit: float
    """Of this run."""

    @property
    def sentence(self) -> str:
        return self.rule.says.format(value=self.worst, limit=self.limit)


@dataclass(eq=False)
class _Follower:
    """One rule along the rows of a run."""

    rule: Rule
    recent: deque[float] = field(init=False)
    beside: deque[float] = field(init=False)
    start: list[float] = field(default_factory=list)
    mean: float = math.nan

    def __post_init__(self) -> None:
        self.recent, self.beside = deque(maxlen=self.rule.window), deque(maxlen=self.rule.window)

    @property
    def limit(self) -> float:
        if not self.rule.relative:
            return self.rule.limit
        return self.rule.limit * sum(self.start) / len(self.start) if self.start else math.nan

    def beyond(self, row: Mapping[str, Any]) -> bool:
        value = finite(row.get(self.rule.key))
        if self.rule.unless and (other := finite(row.get(self.rule.unless[0]))) is not None:
            self.beside.append(other)
        if value is None:
            return False
        self.recent.append(value)
        if len(self.start) < self.rule.window:
            self.start.append(value)
            if self.rule.relative:
                return False
        self.mean = sum(self.recent) / len(self.recent)
        if len(self.recent) < self.rule.least or self._excused() or (self.rule.relative and not self.limit > 0):
            return False
        return self.mean > self.limit if self.rule.when == "above" else self.mean < self.limit

    def _excused(self) -> bool:
        return bool(self.rule.unless and self.beside and sum(self.beside) / len(self.beside) >= self.rule.unless[1])


class Watch:
    """Along a run: `see(row)` answers what this row crossed for the first time."""

    def __init__(self, rules: Sequence[Rule] = RULES) -> None:
        self._followers = [_Follower(r) for r in rules]
        self._said: set[str] = set()

    def see(self, row: Mapping[str, Any]) -> list[Crossing]:
        out, step = [], int(row.get("step", 0))
        for f in self._followers:
            if f.beyond(row) and f.rule.name not in self._said:
                self._said.add(f.rule.name)
                out.append(Crossing(f.rule, step, step, 1, f.mean, f.limit))
        return out


def crossings(rows: Iterable[Mapping[str, Any]], rules: Sequence[Rule] = RULES) -> list[Crossing]:
    """Every rule that the rows of a run crossed, once each, in the rules' order."""
    followers = [_Follower(r) for r in rules]
    found: dict[str, list[tuple[int, float]]] = {r.name: [] for r in rules}
    for row in rows:
        for f in followers:
            if f.beyond(row):
                found[f.rule.name].append((int(row.get("step", 0)), f.mean))
    out = []
    for f in followers:
        if seen := found[f.rule.name]:
            worst = (max if f.rule.when == "above" else min)(v for _, v in seen)
            out.append(Crossing(f.rule, seen[0][0], seen[-1][0], len(seen), worst, f.limit))
    return out


def finite(x: Any) -> float | None:
    """A number that is one; None for anything else."""
    if not isinstance(x, (int, float)) or isinstance(x, bool):
        return None
    try:
        value = float(x)
    except OverflowError:  # a whole number beyond any float
        return None
    return value if math.isfinite(value) else None
