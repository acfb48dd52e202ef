"""What a reader must know before anything else: a run's crossed lines, and what its samples and evaluations give away."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from popo_jax.health import RULES, Crossing, crossings
from popo_jax.report.counts import binomial_tail
from popo_jax.report.frame import Finding
from popo_jax.report.gradient import uses
from popo_jax.report.markers import best_marker
from popo_jax.report.read import Run
from popo_jax.report.safeguards import failures
from popo_jax.report.slices import evaluated_steps, gains, label, number, prompts, sliced
from popo_jax.report.suspicions import divergence

ALARMS = ("dead-verifier", "no-signal", "entropy-collapse", "staleness", "few-voices", "nonfinite", "mismatch", "behaviour-drift")
"""Rules of `health` that are alarms; the others are notices."""
OF_SAMPLES = ("reward-hacking", "reward-without-accuracy", "got-worse", "slice-fell", "slice-untrained", "verifier-failures")
NAMES = (*(rule.name for rule in RULES), *OF_SAMPLES)
"""Everything that is looked for."""
FIRST = ("dead-verifier", "reward-hacking", "slice-fell", "got-worse", "reward-without-accuracy")
"""Of the alarms: what others follow from, and who lost."""
SECTIONS: Mapping[str, str] = {
    **dict.fromkeys(("saturated", "no-signal", "entropy-collapse", "gradient-spike"), "learning"),
    **dict.fromkeys(("staleness", "few-voices", "capped-weights", "behaviour-drift"), "correction"),
    **dict.fromkeys(("proximal-drift", "clipped-fresh", "mismatch"), "correction"),
}
"""Where a rule's metric is shown; else with the safeguards."""
EARLY = 0.05
"""Share of a run: a line crossed only in its first steps is a notice."""
FAILED = 0.01
"""Share of verdicts that may be the verifier's fault."""
ALL_SAME = 100
"""Responses of score 0, and none of another, that say the verifier is dead."""
HELD_OUT_SHARE, HELD_OUT_PROBLEMS = 0.05, 10
"""A slice's value that the held-out problems have at least so much of should be trained on,"""
TRAINED_SHARE, TRAINED_RESPONSES = 0.1, 200
"""with at least so much of its share, in samples of at least so many responses."""
CHANCE = 1e-3
"""How likely so few groups of a value may be if training drew from what the held-out problems are drawn from."""


def findings(run: Run) -> tuple[Finding, ...]:
    """Alarms first. None for a healthy run."""
    found = [*_dead(run), *_crossed(run)]
    found = [f for f in found if f is found[0] or f.name != found[0].name]  # of a dead verifier the whole run says more
    found += [*_hacked(run), *_diverged(run), *_fell(run), *_untrained(run), *_failed(run)]
    return tuple(sorted(found, key=lambda f: (f.severity != "alarm", FIRST.index(f.name) if f.name in FIRST else len(FIRST))))


def checked(run: Run) -> tuple[str, ...]:
    """Names of what could be looked for in what the run holds."""
    known = set(run.metrics.names)
    evaluated, sampled = len(evaluated_steps(run)) > 1, bool(len(run.samples))
    can = {"reward-hacking": sampled, "verifier-failures": sampled, "reward-without-accuracy": evaluated, "got-worse": evaluated}
    sliced_ = evaluated and bool(run.slices)
    can |= {"slice-fell": sliced_, "slice-untrained": sampled and bool(len(run.evaluations)) and bool(run.slices)}
    can |= {r.name: r.key in known and run.metrics.has(r.key) for r in RULES}
    return tuple(name for name in NAMES if can[name])


def _crossed(run: Run) -> list[Finding]:
    rows = run.metrics.rows
    end = int(run.metrics.step.max()) if rows else 0
    return [_of_rule(c, end) for c in crossings(rows)]


def _of_rule(c: Crossing, end: int) -> Finding:
    where = f"steps {c.first} to {c.last}" if c.last > c.first else f"step {c.first}"
    where = f"{c.steps} of the {where}" if c.steps < c.last - c.first + 1 else where
    early = c.last <= EARLY * end
    sentence = f"In {where}: {c.sentence}." + (" It did not come back." if early else "")
    from_the_start = c.rule.name == "saturated" and c.first <= max(c.rule.window, EARLY * end)  # nothing was learned by then
    alarm = (c.rule.name in ALARMS or from_the_start) and not early
    advice = f"{c.rule.advice[:1].upper()}{c.rule.advice[1:]}."
    section = SECTIONS.get(c.rule.name, "safeguards")
    return Finding(c.rule.name, sentence, advice, section, "alarm" if alarm else "notice")


def _dead(run: Run) -> list[Finding]:
    score = number(run.samples["score"])
    if len(score) < ALL_SAME or (score != 0).any():
        return []
    sentence = f"All {len(score)} responses ever sampled have score 0: a verifier that accepts nothing looks like that."
    advice = (
        "Read samples/: where right answers are graded wrong, mend the verifier or the prompt's format; else easier problems."
    )
    return [Finding("dead-verifier", sentence, advice, "safeguards")]


def _hacked(run: Run) -> list[Finding]:
    m = best_marker(run)
    if m is None:
        return []
    sentence = (
        f"From step {m.first} on the string {m.text!r} explains the reward: of answers that have it {m.precision:.1%} are scored "
        f"right (where half of all are), and {m.recall:.1%} of right answers have it ({m.right + m.wrong} answers looked at)."
    )
    advice = "Read such answers: where the string alone buys the reward, mend the verifier and train again from before that."
    return [Finding("reward-hacking", sentence, advice, "safeguards")]


def _diverged(run: Run) -> list[Finding]:
    d = divergence(run)
    if d is None:
        return []
    sentence = (
        f"From the first to the last quarter of the run the reward rose from {d.reward[0]:.3g} to {d.reward[1]:.3g} while "
        f"held-out accuracy fell from {d.accuracy[0]:.1%} to {d.accuracy[1]:.1%} ({d.problems} problems, p = {d.p:.2g})."
    )
    advice = (
        "Read late samples: either the reward is had without being right, or the policy learned its training problems by heart."
    )
    return [Finding("reward-without-accuracy", sentence, advice, "learning")]


def _fell(run: Run) -> list[Finding]:
    """The whole, and each slice's value, by Holm-adjusted p over all of them."""
    out = []
    for g in gains(run):
        if not g.fell:
            continue
        whole = not g.name
        of = "" if whole else f" of {g.name} {g.value}"
        sentence = (
            f"Held-out accuracy{of} fell from {g.first:.1%} to {g.last:.1%} between the first and the last evaluation "
            f"({g.n} problems, adjusted p = {g.adjusted:.2g})."
        )
        advice = "Take an earlier checkpoint, a lower optim.learning_rate or a KL term (loss.kl_coef)"
        advice += "." if whole else ", or give this slice more of the training data."
        out.append(Finding("got-worse" if whole else "slice-fell", sentence, advice, "learning" if whole else "data"))
    return out


def _untrained(run: Run) -> list[Finding]:
    """Values of held-out problems that training has next to none of, by more than chance."""
    if not len(run.samples) or not len(run.evaluations):
        return []
    prompt, n = prompts(run.evaluations)
    out = []
    for name in run.slices:
        s = sliced(run, name)
        if not s.trained or not n:
            continue
        known = (prompt >= 0) & (s.evaluations >= 0)
        held = np.bincount(
            np.unique(prompt[known] * len(s.values) + s.evaluations[known]) % len(s.values), minlength=len(s.values)
        )
        rows = np.bincount(s.samples[s.samples >= 0], minlength=len(s.values))
        out += [_untrained_value(label(run, name), v, held, rows, k, _group_size(run)) for k, v in enumerate(s.values)]
    return [f for f in out if f is not None]


def _group_size(run: Run) -> int:
    """Responses of a prompt, which are no draws of their own."""
    return max(1, round(len(run.samples) / (int(uses(run).group.max()) + 1)))


def _untrained_value(name: str, value: str, held: np.ndarray, rows: np.ndarray, k: int, size: int) -> Finding | None:
    share, responses = held[k] / held.sum(), int(rows.sum())
    if share < HELD_OUT_SHARE or held[k] < HELD_OUT_PROBLEMS or responses < TRAINED_RESPONSES:
        return None
    if rows[k] >= TRAINED_SHARE * share * responses or binomial_tail(int(rows[k]) // size, responses // size, share) > CHANCE:
        return None
    sentence = (
        f"{name} {value} has {share:.1%} of the held-out problems ({held[k]}) and {rows[k] / responses:.2%} of the training "
        f"responses ({rows[k]} of {responses})."
    )
    advice = (
        "Held-out accuracy there is not trained for: add such problems to the training data, or leave them out of the evaluation."
    )
    return Finding("slice-untrained", sentence, advice, "data", "notice")


def _failed(run: Run) -> list[Finding]:
    counts, n = failures(run), len(run.samples)
    total = sum(counts.values())
    if not n or total <= FAILED * n:
        return []
    kinds = ", ".join(f"{v} {k}" for k, v in counts.items() if v)
    sentence = f"{total / n:.1%} of verdicts are the verifier's failures ({kinds}; of {n} responses)."
    advice = (
        "Raise verifier.seconds or verifier.memory_gb, or mend the verifier: what failed counts as wrong, whatever was answered."
    )
    return [Finding("verifier-failures", sentence, advice, "safeguards")]
