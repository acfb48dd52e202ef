"""What was it trained on? Which prompts bore the gradient, how unevenly, and how replay shifted the mix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc

from popo_jax.report.counts import gini
from popo_jax.report.frame import Figure, Section, Series, Table
from popo_jax.report.gradient import KEEPS, Uses, uses
from popo_jax.report.read import Run
from popo_jax.report.slices import Gain, Sliced, evaluated_steps, gains, label, number, prompts, sliced

POINTS = 200
"""Of a curve over prompts."""
EPSILON = 1e-6


def section(run: Run) -> Section:
    """Id "data"."""
    prompt, n = prompts(run.samples)
    used, notes = uses(run), _notes(run)
    if not n:
        return Section("data", "What was it trained on?", notes=("No samples with a prompt's id were kept.",), tables=_gains(run))
    if used.lost:
        notes = (*notes, f"{used.lost} replays are of groups whose samples are not there; they are not counted.")
    weight = np.bincount(prompt[prompt >= 0], used.total[prompt >= 0], minlength=n)
    slices = [sliced(run, name) for name in run.slices]
    curve = (_weight(prompt, weight),) if weight.sum() else ()
    if not weight.sum():
        notes = (*notes, "No sampled response bore a gradient.")
    mixes = tuple(_mix(run, label(run, s.name), s, used) for s in slices if s.trained)
    tables = (_prompts(run, prompt, n, weight, used), *_slices(run, slices, prompt, used), *_gains(run))
    return Section("data", "What was it trained on?", (*curve, *mixes), tables, notes)


def _notes(run: Run) -> tuple[str, ...]:
    name = run.setting("algorithm.name")
    if name in KEEPS:
        says = f"{name} trains on every group; those with equal scores have advantage 0 and bear no gradient."
    else:
        says = "A group bears a gradient in its own step when it is effective, and in every step that replays it."
    none = () if run.slices else ("No column of the data was named to slice by (tasks[].slices), and there is one task.",)
    return (f"{says} A response counts once per use, where its advantage is not 0.", *none)


def _prompts(run: Run, prompt: np.ndarray, n: int, weight: np.ndarray, used: Uses) -> Table:
    right, wrong = (_always(run, prompt, n, signal) for signal in ("all_right", "all_wrong"))
    never = weight == 0
    counts = {
        "prompts seen": n,
        "carried gradient at least once": int((~never).sum()),
        "never: always right": int((never & right).sum()),
        "never: always wrong": int((never & wrong).sum()),
        "never: mixed otherwise": int((never & ~right & ~wrong).sum()),
    }
    _, at = np.unique(used.group, return_index=True)
    groups = np.bincount(prompt[at][prompt[at] >= 0], minlength=n)
    rows: list[tuple[Any, ...]] = [(k, v, v / n) for k, v in counts.items()]
    rows += [("groups per prompt, mean", float(groups.mean()), None), ("groups per prompt, max", int(groups.max()), None)]
    note = (
        "A prompt that never carried gradient cost samples and taught nothing; always wrong may mean too hard, or a wrong answer."
    )
    return Table("data/prompts", "Prompts and whether they ever taught", ("what", "count", "share"), tuple(rows), note)


def _always(run: Run, prompt: np.ndarray, n: int, signal: str) -> np.ndarray:
    """bool [n]: prompts of which every row has the signal; where it was not kept, every answer's correctness says so."""
    correct = number(run.samples["correct"])
    by_rows = correct >= 1 - EPSILON if signal == "all_right" else correct <= EPSILON
    kept = run.samples["signal"]
    has = pc.fill_null(pc.equal(kept, signal), False).to_numpy()
    there = pc.is_valid(kept).to_numpy()
    row = np.where(there, has, by_rows)
    known = prompt >= 0
    return np.bincount(prompt[known], ~row[known], minlength=n) == 0


def lorenz(x: np.ndarray, points: int = POINTS) -> tuple[list[float], list[float]]:
    """(share of the holders, smallest first; the share of the total that they hold), both from 0 to 1."""
    held = np.concatenate([[0.0], np.cumsum(np.sort(x))])
    at = np.unique(np.linspace(0, len(x), min(points, len(x) + 1)).round().astype(int))
    return (at / len(x)).tolist(), (held[at] / held[-1]).tolist()


def _weight(prompt: np.ndarray, weight: np.ndarray) -> Figure:
    sampled = np.bincount(prompt[prompt >= 0], minlength=len(weight))
    (x, y), (sx, sy) = lorenz(weight), lorenz(sampled)
    series = (Series("gradient-bearing rows", x, y), Series("sampled responses", sx, sy), Series("equal shares", [0, 1], [0, 1]))
    note = (
        f"Prompts ordered by how much they bore. Gini coefficient {gini(weight):.3f} of gradient-bearing rows, "
        f"{gini(sampled):.3f} of sampled responses: 0 means every prompt bore the same, near 1 a few prompts all of it."
    )
    title = f"How evenly prompts bore the gradient (Gini {gini(weight):.2f})"
    return Figure("data/weight", title, "line", "share of prompts", "share of rows", series, note=note, percent=True)


def _shares(s: Sliced, amount: np.ndarray) -> np.ndarray:
    """float [values] of the rows that have a value; NaN if there is none."""
    known = s.samples >= 0
    total = np.bincount(s.samples[known], amount[known], minlength=len(s.values))
    return total / total.sum() if total.sum() else np.full(len(total), np.nan)


def _mix(run: Run, name: str, s: Sliced, used: Uses) -> Figure:
    amounts = {
        "sampled responses": np.ones(len(s.samples)),
        "gradient-bearing rows without replay": used.fresh,
        "gradient-bearing rows with replay": used.total,
    }
    if not used.replayed.any():
        del amounts["gradient-bearing rows with replay"]
    series = tuple(Series(k, s.values, _shares(s, v).tolist()) for k, v in amounts.items())
    how = "what MoPPS chose" if run.setting("selection.method") == "mopps" else "what uniform sampling gave"
    note = f"Sampled responses are {how}; the rest is what the updates were made from."
    return Figure(f"data/mix-{name}", f"The mix by {name}", "bar", name, "share of rows", series, note=note, percent=True)


def _slices(run: Run, slices: list[Sliced], prompt: np.ndarray, used: Uses) -> tuple[Table, ...]:
    if not slices:
        return ()
    rows = [row for s in slices for row in _slice_rows(run, s, prompt, used)]
    columns = (
        *("slice", "value", "prompts", "sampled rows", "gradient rows", "shift by replay, points"),
        *("held-out accuracy, first", "held-out accuracy, last"),
    )
    note = (
        "Shift by replay: the value's share of gradient-bearing rows with replay less that without. Rows without a value are out."
    )
    return (Table("data/slices", "Slices of the data", columns, tuple(rows), note),)


def _slice_rows(run: Run, s: Sliced, prompt: np.ndarray, used: Uses) -> list[tuple[Any, ...]]:
    shift = 100 * (_shares(s, used.total) - _shares(s, used.fresh))
    steps, step = evaluated_steps(run), run.evaluations["step"].to_numpy()
    correct, rows = number(run.evaluations["correct"]), []
    for k, value in enumerate(s.values):
        mine, asked = s.samples == k, (s.evaluations == k) & np.isfinite(correct)
        ends = [correct[asked & (step == at)] for at in (steps[[0, -1]] if len(steps) else ())]
        first, last = [float(c.mean()) if len(c) else None for c in ends] or [None, None]
        seen = len(np.unique(prompt[mine & (prompt >= 0)]))
        moved = float(shift[k]) if np.isfinite(shift[k]) else None
        rows.append((label(run, s.name), value, seen, int(mine.sum()), int(used.total[mine].sum()), moved, first, last))
    return rows


def _gains(run: Run) -> tuple[Table, ...]:
    found = gains(run)
    if not found:
        return ()
    columns = (
        *("slice", "value", "problems", "first", "last", "difference, points", "low, points", "high, points"),
        *("p", "p, Holm-adjusted"),
    )
    steps = evaluated_steps(run)
    note = (
        f"Held-out problems at step {steps[0]} and step {steps[-1]}, paired by problem: 95 % normal interval over problems, "
        f"exact sign test. Of {len(found)} comparisons some look significant by chance: read the adjusted p, and trust no "
        "small slice."
    )
    return (Table("data/gains", "What held-out accuracy gained, by slice", columns, tuple(_gain_row(g) for g in found), note),)


def _gain_row(g: Gain) -> tuple[Any, ...]:
    points = tuple(100 * x if np.isfinite(x) else None for x in (g.difference, g.low, g.high))
    return (g.name or "all", g.value or "all", g.n, g.first, g.last, *points, g.p, g.adjusted)
