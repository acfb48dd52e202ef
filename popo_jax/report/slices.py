"""Samples and evaluations by the values of a slice, and what held-out accuracy gained in each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from popo_jax.report.counts import holm, paired_interval, sign_test
from popo_jax.report.read import SLICE, Run

MAX_VALUES = 30
"""Of a slice; of more the largest are kept and the rest are OTHER."""
OTHER = "other"


def coded(column: pa.ChunkedArray) -> tuple[np.ndarray, list[Any]]:
    """(int64 [n] index of each row's value, -1 for null; the values)."""
    joined = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    d = pc.dictionary_encode(joined)
    if isinstance(d, pa.ChunkedArray):
        d = d.combine_chunks()
    return pc.fill_null(d.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False), d.dictionary.to_pylist()


def number(column: pa.ChunkedArray) -> np.ndarray:
    """float64 [n], NaN for null."""
    return np.asarray(column.cast(pa.float64()).to_numpy(), float)


def prompts(table: pa.Table) -> tuple[np.ndarray, int]:
    """(int64 [n] number of each row's prompt, -1 where it is unknown; how many prompts). A prompt is a task and an id."""
    task, tasks = coded(table["task"])
    id_, _ = coded(table["prompt_id"])
    key = np.where(id_ < 0, -1, id_ * (len(tasks) + 1) + task + 1)
    known, code = np.unique(key[key >= 0], return_inverse=True)
    out = np.full(len(key), -1, np.int64)
    out[key >= 0] = code
    return out, len(known)


def label(run: Run, name: str) -> str:
    """Of a slice: its column's name, unique in the run."""
    short = name.removeprefix(SLICE)
    return short if short == name or short not in run.slices else name.replace("/", "-")


@dataclass(frozen=True, eq=False)
class Sliced:
    """The rows of a run by one slice."""

    name: str
    values: tuple[str, ...]
    samples: np.ndarray
    """int64, index of values for every row of run.samples, -1 where there is no value."""
    evaluations: np.ndarray

    @cached_property
    def trained(self) -> bool:
        """Whether the training data say anything of this slice."""
        return bool((self.samples >= 0).any())


def sliced(run: Run, name: str) -> Sliced:
    """At most MAX_VALUES values: where there are more, the most sampled (then the most evaluated), and OTHER."""
    parts, counts, lists = [], [], []
    for table in (run.samples, run.evaluations):
        code, values = coded(table[name]) if name in table.column_names else (np.full(table.num_rows, -1, np.int64), [])
        parts.append(code)
        lists.append([str(v) for v in values])
        counts.append(dict(zip(lists[-1], np.bincount(code[code >= 0], minlength=len(values)).tolist(), strict=True)))
    found = sorted(set(lists[0]) | set(lists[1]), key=lambda v: (-counts[0].get(v, 0), -counts[1].get(v, 0), v))
    kept = found if len(found) <= MAX_VALUES else found[: MAX_VALUES - 1]
    shown = [*sorted(kept, key=_natural), *([OTHER] if len(kept) < len(found) else [])]
    place = {v: shown.index(v) if v in kept else len(shown) - 1 for v in found}
    codes = [np.array([*(place[v] for v in values), -1], np.int64)[code] for code, values in zip(parts, lists, strict=True)]
    return Sliced(name, tuple(shown), codes[0], codes[1])


def _natural(value: str) -> tuple[int, float, str]:
    """Numbers by size, before words by letter."""
    try:
        return (0, float(value), value) if math.isfinite(float(value)) else (1, 0.0, value)
    except ValueError:
        return (1, 0.0, value)


@dataclass(frozen=True, eq=False)
class Solved:
    """Mean correctness of every held-out problem in some evaluations."""

    problem: np.ndarray
    """int64 [n] as numbered by `prompts`, ascending."""
    correct: np.ndarray
    """float [n]."""


def solved(run: Run, steps: np.ndarray) -> Solved:
    """Over all answers of the evaluations at `steps`; answers without a verdict are left out."""
    e = run.evaluations
    problem, n = prompts(e)
    correct = number(e["correct"])
    keep = np.isin(e["step"].to_numpy(), steps) & (problem >= 0) & np.isfinite(correct)
    many = np.bincount(problem[keep], minlength=n)
    total = np.bincount(problem[keep], correct[keep], minlength=n)
    seen = np.flatnonzero(many)
    return Solved(seen, total[seen] / many[seen])


def evaluated_steps(run: Run) -> np.ndarray:
    """Steps with an evaluation on disk, ascending."""
    return np.unique(run.evaluations["step"].to_numpy())


@dataclass(frozen=True)
class Gain:
    """Change of held-out accuracy between the first and the last evaluation, over problems that both have."""

    name: str
    """Of the slice; empty for the whole, as is the value."""
    value: str
    n: int
    first: float
    last: float
    difference: float
    low: float
    """95 % paired interval of the difference."""
    high: float
    p: float
    """Exact sign test: problems that rose against problems that fell."""
    adjusted: float
    """Holm's, over all slices' values and the whole."""
    up: int
    down: int
    """Problems that rose, and that fell."""

    @property
    def fell(self) -> bool:
        """More problems fell than rose, by more than chance, and the mean fell, too."""
        return self.difference < 0 and self.down > self.up and self.adjusted < 0.05


def gains(run: Run) -> tuple[Gain, ...]:
    """The whole first, then every slice's values. Empty with less than two evaluations, or no problem in both."""
    steps = evaluated_steps(run)
    if len(steps) < 2:
        return ()
    first, last = solved(run, steps[:1]), solved(run, steps[-1:])
    both, i, j = np.intersect1d(first.problem, last.problem, return_indices=True)
    if not len(both):
        return ()
    before, after = first.correct[i], last.correct[j]
    problem, n = prompts(run.evaluations)
    found = [_gain("", "", before, after)]
    for name in run.slices:
        s = sliced(run, name)
        known = (problem >= 0) & (s.evaluations >= 0)
        value = np.full(n, -1, np.int64)
        value[problem[known]] = s.evaluations[known]
        for k, v in enumerate(s.values):
            rows = value[both] == k
            if rows.any() and not rows.all():  # all of them: the whole once more
                found.append(_gain(label(run, name), v, before[rows], after[rows]))
    return tuple(replace(g, adjusted=a) for g, a in zip(found, holm([g.p for g in found]), strict=True))


def _gain(name: str, value: str, before: np.ndarray, after: np.ndarray) -> Gain:
    d = after - before
    up, down = int((d > 1e-9).sum()), int((d < -1e-9).sum())
    p = sign_test(up, down)
    return Gain(name, value, len(d), float(before.mean()), float(after.mean()), *paired_interval(d), p, p, up, down)
