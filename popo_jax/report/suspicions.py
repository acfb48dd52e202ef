"""Signs that a reward is had by something else than being right. Each may be innocent: a reader looks, no program judges."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from popo_jax.report.counts import sign_test
from popo_jax.report.gradient import uses
from popo_jax.report.read import Run
from popo_jax.report.slices import coded, evaluated_steps, number, prompts, solved

EPSILON = 1e-6
SHORT, LONG = 8, 16
"""Tokens: a right answer below the one in a group whose median is above the other, and a quarter of it, is short."""
MANY_PROMPTS = 5
"""Prompts for which one and the same answer was right."""


def right_rows(run: Run) -> np.ndarray:
    """bool [n] of run.samples: wholly correct; where correctness was not kept, the run's best score."""
    correct, score = number(run.samples["correct"]), number(run.samples["score"])
    best = score[np.isfinite(score)].max(initial=-math.inf)
    return np.where(np.isfinite(correct), correct >= 1 - EPSILON, (score >= best - EPSILON) & (best > 0))


def short_rows(run: Run, right: np.ndarray) -> np.ndarray:
    """bool [n]: right answers of effective groups, below SHORT tokens and below a quarter of their group's median > LONG."""
    s = run.samples
    length = number(s["response_tokens"])
    group = uses(run).group
    order, size = np.lexsort((length, group)), np.bincount(group)
    start = np.cumsum(size) - size
    ordered = length[order]
    median = (ordered[start + (size - 1) // 2] + ordered[start + size // 2]) / 2
    signal, signals = coded(s["signal"])
    effective = signal == signals.index("effective") if "effective" in signals else np.zeros(len(signal), bool)
    return right & effective & (length < SHORT) & (median[group] > LONG) & (length < median[group] / 4)


def same_rows(run: Run, right: np.ndarray) -> np.ndarray:
    """bool [n]: right answers whose text was right for at least MANY_PROMPTS prompts."""
    text, texts = coded(run.samples["text_hash"])
    prompt, n = prompts(run.samples)
    known = right & (text >= 0) & (prompt >= 0)
    pairs = np.unique(text[known] * max(n, 1) + prompt[known]) // max(n, 1)
    return known & (np.bincount(pairs, minlength=len(texts) + 1)[text] >= MANY_PROMPTS)


@dataclass(frozen=True)
class Divergence:
    """Reward rose from the first to the last quarter of a run while held-out accuracy fell."""

    reward: tuple[float, float]
    accuracy: tuple[float, float]
    problems: int
    p: float
    """Exact sign test over held-out problems."""


def divergence(run: Run) -> Divergence | None:
    """None unless both are significant: the reward by 2.58 standard errors over steps, the fall by p < 0.05 over problems."""
    step, reward = run.metrics.step, run.metrics["reward/mean"]
    if not len(step) or not len(run.evaluations):
        return None
    end = int(step.max())
    early, late = (reward[np.isfinite(reward) & at & (step > 0)] for at in (step <= end / 4, step > 3 * end / 4))
    if min(len(early), len(late)) < 4:
        return None
    error = math.sqrt(early.var(ddof=1) / len(early) + late.var(ddof=1) / len(late))
    if late.mean() - early.mean() <= max(2.58 * error, EPSILON):
        return None
    tests = evaluated_steps(run)
    before, after = solved(run, tests[tests <= end / 4]), solved(run, tests[tests > 3 * end / 4])
    both, i, j = np.intersect1d(before.problem, after.problem, return_indices=True)
    d = after.correct[j] - before.correct[i]
    p = sign_test(int((d > 1e-9).sum()), int((d < -1e-9).sum()))
    if not len(both) or d.mean() >= 0 or p >= 0.05:
        return None
    accuracy = (float(before.correct[i].mean()), float(after.correct[j].mean()))
    return Divergence((float(early.mean()), float(late.mean())), accuracy, len(both), p)
