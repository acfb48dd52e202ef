"""Is it learning? Held-out accuracy with intervals, reward, entropy, lengths, what became of the groups, what others cost."""

from __future__ import annotations

from typing import Any

import numpy as np

from popo_jax.report import curves
from popo_jax.report.curves import mean_interval, places, present, series, smoothed, wilson, worry
from popo_jax.report.frame import Figure, Section, Series, Table
from popo_jax.report.read import Run
from popo_jax.report.slices import evaluated_steps, solved

MAX_ROUNDS = 4
"""Of dynamic sampling in one step, where the config does not say."""


def section(run: Run) -> Section:
    figures = [accuracy(run), *_curves(run), groups(run), slots(run), sampling_cost(run)]
    tables = [_summary(run)]
    shown, listed = tuple(f for f in figures if f is not None and f.series), tuple(t for t in tables if t is not None)
    notes = [] if run.metrics.has("eval/accuracy") else ["No evaluation is recorded: whether it learned is not known."]
    return Section("learning", "Is it learning?", shown, listed, tuple(notes))


def by_problem(run: Run, task: str | None = None) -> dict[int, np.ndarray]:
    """Step -> accuracy of each held-out problem, over its answers; from evaluations/."""
    table = run.evaluations.select(["step", "task", "prompt_id", "correct"])
    if not table.num_rows:
        return {}
    means = table.group_by(["step", "task", "prompt_id"]).aggregate([("correct", "mean")])
    step, name, value = means["step"].to_numpy(), means["task"].to_numpy(zero_copy_only=False), means["correct_mean"].to_numpy()
    kept = np.ones(len(step), bool) if task is None else name == task
    return {int(s): value[kept & (step == s)] for s in np.unique(step)}


def accuracy(run: Run) -> Figure:
    """learning/accuracy: overall, per task where there are several, and with grey pictures where it was asked so."""
    found = present(_scores(run, "eval/accuracy", "held out", by_problem(run)))
    tasks = sorted({k.split("/")[1] for k in run.metrics.names if k.startswith("eval/") and k.count("/") == 2} - {"blind"})
    if len(tasks) > 1:
        found += present(*(_scores(run, f"eval/{t}/accuracy", t, by_problem(run, t), len(tasks)) for t in tasks))
    found += present(_scores(run, "eval/blind/accuracy", "held out, pictures in grey", {}))
    n = run.setting("eval.problems")
    shared = ", tasks in equal shares" if len(tasks) > 1 else ""
    how = "by problem, from evaluations/" if run.evaluations.num_rows else f"Wilson's, of {n} problems as the config says{shared}"
    note = f"Bands are 95 % intervals ({how}): they say how sure each point is, not how runs with other seeds differ."
    return Figure(
        "learning/accuracy", "Accuracy on held-out problems", "line", "step", "accuracy", found, note=note, percent=True
    )


def _scores(run: Run, key: str, name: str, problems: dict[int, np.ndarray], among: int = 1) -> Series | None:
    """Of a task that is one `among` several, which share eval.problems equally."""
    raw = series(run, key, name)
    if raw is None:
        return None
    n = run.setting("eval.problems")
    known = isinstance(n, int) and n > 0
    ends = [tuple(map(float, wilson(np.array(y), n / among))) if known else (np.nan, np.nan) for y in raw.y]
    for i, s in enumerate(raw.x):
        if s in problems and len(problems[s]):
            ends[i] = mean_interval(problems[s])[1:]
    low, high = [e[0] for e in ends], [e[1] for e in ends]
    return Series(name, raw.x, raw.y, low, high, raw.other_x)


def _curves(run: Run) -> list[Figure]:
    def figure(name: str, title: str, y: str, keys: dict[str, str], note: str, percent: bool = False) -> Figure:
        found = [
            s for key, label in keys.items() for s in (series(run, key, label), smoothed(run, key, f"{label}, rolling mean"))
        ]
        line = worry(run, next(iter(keys)))
        return Figure(f"learning/{name}", title, "line", "step", y, present(*found), line, note, percent)

    rewards = {"reward/mean": "reward", "accuracy/train": "accuracy in training"}
    what = "Of the responses sampled in training, before any group is replaced."
    return [
        figure("reward", "Reward in training", "mean of the batch", rewards, what),
        figure("entropy", "Entropy of the policy", "nats a token", {"entropy": "entropy"}, "Falls as the policy grows sure."),
        figure("length", "Length of responses", "tokens", {"response/length": "mean length"}, what),
        figure("truncated", "Responses cut by the limit", "share", {"response/truncated": "cut"}, what, percent=True),
    ]


def groups(run: Run) -> Figure:
    """learning/groups: what became of the groups that were sampled (dapo: in all rounds), as the metrics have it."""
    m = run.metrics
    rows = np.isfinite(m["groups/effective"])
    x, over = m.step[rows].tolist(), places(m, rows)
    kinds = ("effective", "all_right", "all_wrong", "invalid")
    found = tuple(Series(k.replace("_", " "), x, np.nan_to_num(m[f"groups/{k}"][rows]).tolist(), other_x=over) for k in kinds)
    note = "effective: some answers right, some wrong: a signal. invalid: a verifier failed, or no row counts."
    return Figure(
        "learning/groups", "Groups that were sampled", "area", "step", "share", found if x else (), note=note, percent=True
    )


def slots(run: Run) -> Figure | None:
    """learning/slots: what the slots of a batch trained on: a group of the step's own, a stored one, or nothing."""
    m = run.metrics
    filled, unfilled = m["replay/filled"], m["replay/unfilled"]
    rows = np.isfinite(filled) & np.isfinite(unfilled)
    prompts, extra = run.number("batch.prompts"), run.number("replay.extra") or 0.0
    if prompts is None or not rows.any() or not np.nansum(filled):
        return None
    total, x, over = prompts + extra, m.step[rows].tolist(), places(m, rows)
    parts = {"own groups": total - filled[rows] - unfilled[rows], "replayed": filled[rows], "unfilled": unfilled[rows]}
    found = tuple(Series(k, x, (v / total).tolist(), other_x=over) for k, v in parts.items())
    note = f"Of {total:.0f} slots a step. Replayed: the slot's own group had no signal, and a stored one took its place"
    note += f"; {extra:.0f} slots are for stored groups alone." if extra else "."
    return Figure("learning/slots", "What the batch trained on", "area", "step", "share of slots", found, note=note, percent=True)


def sampling_cost(run: Run) -> Figure | None:
    """learning/sampling-cost: responses that dynamic sampling would have generated to fill every batch with effective groups."""
    m = run.metrics
    rows = np.isfinite(m["groups/effective"]) & np.isfinite(m["rollouts_total"])
    if not rows.any() or run.setting("algorithm.name") == "dapo":
        return None
    total, effective, x = m["rollouts_total"][rows], m["groups/effective"][rows], m.step[rows].tolist()
    most = run.number("algorithm.max_rounds") or MAX_ROUNDS
    each = np.diff(np.concatenate([[0.0], total]))
    rounds = np.minimum(np.ceil(1 / np.maximum(effective, 1e-9) - 1e-9), most)
    over = places(m, rows)
    curves_of = {"this run": total, "dynamic sampling, estimated": np.cumsum(each * rounds)}
    found = tuple(Series(name, x, y.tolist(), other_x=over) for name, y in curves_of.items())
    note = f"An estimate: whole rounds until the share of effective groups fills the batch, at most {most:.0f}. A policy trained "
    note += "that way would have been another, with other shares."
    title = "Responses generated, and what dynamic sampling would have (estimated)"
    return Figure("learning/sampling-cost", title, "line", "step", "responses", found, note=note)


def _summary(run: Run) -> Table | None:
    """learning/summary."""
    if not len(run.metrics.rows):
        return None
    rows = [
        *_evaluated(run),
        ("steps", int(run.metrics.step.max()), ""),
        ("responses", int(np.nan_to_num(run.metrics.last("rollouts_total"))), ""),
        ("tokens", int(np.nan_to_num(run.metrics.last("tokens_generated_total"))), ""),
        ("hours", float(curves.hours(run.metrics)[-1]), "wall clock"),
    ]
    note = "The best of several evaluations is better than it would be if asked again." if len(rows) > 4 else ""
    return Table("learning/summary", "In short", ("what", "value", "where"), tuple(rows), note)


def _evaluated(run: Run) -> list[tuple[str, Any, str]]:
    """Rows of the summary, none without an evaluation. The interval is over problems, each with its answers in both."""
    known = np.isfinite(run.metrics["eval/accuracy"])
    if not known.any():
        return []
    score, step = run.metrics["eval/accuracy"][known], run.metrics.step[known]
    n, low, high, how = run.setting("eval.problems"), np.nan, np.nan, ""
    if np.isin(step[-2:], evaluated_steps(run)).all():
        _, low, high = mean_interval(solved(run, step[-2:]).correct)
    elif isinstance(n, int) and n > 0:
        low, high = map(float, wilson(score[-2:].mean(), n))
        how = f" (Wilson's, of {n} problems as the config says)"
    where = f"95 % interval {low:.3f} to {high:.3f}{how}" if np.isfinite(low) else ""
    return [
        ("held-out accuracy at first", float(score[0]), f"step {int(step[0])}"),
        ("mean of the last two evaluations", float(score[-2:].mean()), where),
        ("best evaluation", float(score.max()), f"step {int(step[score.argmax()])}"),
    ]
