"""Groups to browse: a bounded choice over the whole run, with all answers, verdicts and when they were replayed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from popo_jax.report.frame import Section, to_plain
from popo_jax.report.pictures import Pictures
from popo_jax.report.read import SLICE, Run

MOST_CHARS = 4000
"""Of a text."""
MOST_STEPS = 40
"""Whose files are read, besides those read for a rare signal."""
OF_EACH_SIGNAL = 5
"""Groups of every signal that the steps chosen should hold, where the run has as many."""
PREFERENCE = 0.2
"""How much nearer to the front a replayed group is, where chance spreads groups over [0, 1)."""
MOST_USES = 20
"""Replays listed of one group; all are counted."""


@dataclass(frozen=True, eq=False)
class _Groups:
    """The groups of a run, by step."""

    step: np.ndarray
    id: np.ndarray
    signal: np.ndarray
    """int [n] each; signal: index of `signals`."""
    signals: tuple[str, ...]
    """Rarest first."""
    uses: np.ndarray
    """How often it was replayed."""


def section(run: Run, *, most_bytes: int = 4_000_000, most_groups: int = 400) -> Section:
    """`data`: {groups, images, slices}. A group: run, step, group_id, task, prompt_id, slices, signal, prompt, images, uses,
    replays [[step, age], ...], answers [{text, score, correct, reason, tokens, ended, advantage}, ...].

    Groups are spread over the steps, every signal is among them, replayed ones a little more often than others; the same run
    gives the same choice.
    """
    groups = _groups(run)
    if not len(groups.step):
        return Section("samples", "Samples", notes=("There are no samples to browse.",))
    order = _order(groups, most_groups)
    pictures = Pictures(run.path, most_bytes // 2)
    read, unreadable = _read(run, groups, order)
    shown, size = [], 0
    for group in (read[i] for i in order if i in read):
        size += len(json.dumps(group, ensure_ascii=False).encode(errors="replace"))
        if size + pictures.size > most_bytes:
            break
        names = group["images"]
        group["images"] = [name for name in names if pictures.add(name)]
        shown.append(group | {"images_left_out": len(names) - len(group["images"])})
    shown.sort(key=lambda g: (g["step"], g["group_id"]))
    data = {"groups": shown, "images": pictures.shown, "slices": [s.removeprefix(SLICE) for s in run.slices]}
    return Section("samples", "Samples", notes=_notes(groups, shown, order, unreadable, pictures), data=data)


def _notes(groups: _Groups, shown: Sequence[Any], order: np.ndarray, bad: Sequence[int], pictures: Pictures) -> tuple[str, ...]:
    steps, of = len({g["step"] for g in shown}), len(np.unique(groups.step))
    out = [
        f"Shown are {len(shown):,} of {len(groups.step):,} groups, from {steps:,} of {of:,} steps: spread over the run, with "
        "every signal among them and replayed groups a little more often. All of them are in samples/."
    ]
    if len(shown) < len(order):
        out.append(f"{len(order) - len(shown):,} more were chosen, but left out to keep the page small.")
    if bad:
        out.append(f"Samples of step {', '.join(map(str, bad[:5]))}{' and others' if len(bad) > 5 else ''} cannot be read.")
    return (*out, *pictures.notes)


def _groups(run: Run) -> _Groups:
    table = run.samples.select(["step", "group_id", "signal"])
    table = table.filter(pc.is_valid(table["group_id"]))
    found = table.group_by(["step", "group_id"], use_threads=False).aggregate([("signal", "first")])
    signal = np.array(found["signal_first"].fill_null("unknown").to_pylist(), object).astype(str)
    names, index, counts = np.unique(signal, return_inverse=True, return_counts=True)
    rare = np.argsort(counts, kind="stable")
    ids = found["group_id"].to_numpy().astype(np.int64)
    replayed, uses = np.unique(run.replays["group_id"].drop_null().to_numpy().astype(np.int64), return_counts=True)
    at = np.searchsorted(replayed, ids).clip(max=max(len(replayed) - 1, 0))
    used = np.where(replayed[at] == ids, uses[at], 0) if len(replayed) else np.zeros(len(ids), int)
    step = found["step"].to_numpy().astype(np.int64)
    return _Groups(step, ids, np.argsort(rare)[index] if len(index) else index, tuple(names[rare].tolist()), used)


def _order(groups: _Groups, most: int) -> np.ndarray:
    """Indices of the chosen groups, the most wanted first: one of each signal, then one of each step, a second of each step, ...

    Within a step signals take turns, the rarest first.
    """
    n = len(groups.step)
    chance = np.random.default_rng(0).random(n) - PREFERENCE * (groups.uses > 0)
    candidates = np.flatnonzero(np.isin(groups.step, _steps(groups, most)))
    turn = _rank(candidates, (groups.step, groups.signal), (chance,))
    within = np.zeros(n, int)
    within[candidates] = turn
    round_ = _rank(candidates, (groups.step,), (within, groups.signal))
    order = candidates[np.lexsort((groups.step[candidates], round_))]
    _, first = np.unique(groups.signal[order], return_index=True)
    rest = np.setdiff1d(np.arange(len(order)), first)
    return order[np.concatenate([first, rest])][:most]


def _rank(at: np.ndarray, of: Sequence[np.ndarray], by: Sequence[np.ndarray]) -> np.ndarray:
    """int [len(at)]: the place of each among those with the same `of`, by `by` (the first counts most)."""
    keys = [k[at] for k in (*reversed(by), *reversed(of))]
    order = np.lexsort(keys)
    same = np.ones(len(at), bool)
    for k in of:
        same[1:] &= k[at][order][1:] == k[at][order][:-1]
    same[:1] = False
    start = np.maximum.accumulate(np.where(same, 0, np.arange(len(at))))
    out = np.empty(len(at), int)
    out[order] = np.arange(len(at)) - start
    return out


def _steps(groups: _Groups, most: int) -> np.ndarray:
    """Steps whose files are read: evenly over the run, and such that no signal is missing."""
    chosen = _spread(np.unique(groups.step), min(MOST_STEPS, most))
    for s in range(len(groups.signals)):
        lacking = OF_EACH_SIGNAL - int(((groups.signal == s) & np.isin(groups.step, chosen)).sum())
        if lacking > 0:
            having = np.setdiff1d(groups.step[groups.signal == s], chosen)
            chosen = np.union1d(chosen, _spread(having, lacking))
    return chosen


def _spread(x: np.ndarray, most: int) -> np.ndarray:
    return x[np.unique(np.linspace(0, len(x) - 1, min(most, len(x))).round().astype(int))]


def _read(run: Run, groups: _Groups, order: np.ndarray) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """Of the chosen groups those that can be read, by their index, and steps that cannot."""
    replays = _replays(run, groups.id[order])
    out: dict[int, dict[str, Any]] = {}
    bad = []
    for step in np.unique(groups.step[order]).tolist():
        wanted = {int(groups.id[i]): int(i) for i in order if groups.step[i] == step}
        table = run.texts("samples", step)
        if table is None or "group_id" not in table.column_names:
            bad.append(step)
            continue
        table = table.filter(pc.is_in(table["group_id"].cast(pa.int64()), pa.array(list(wanted), pa.int64())))
        for id_, rows in _by_group(table):
            i = wanted[id_]
            known = {"run": run.name, "step": step, "group_id": id_, "signal": groups.signals[groups.signal[i]]}
            out[i] = known | {"uses": int(groups.uses[i]), "replays": replays.get(id_, [])} | _group(rows)
    return out, bad


def _replays(run: Run, ids: np.ndarray) -> dict[int, list[list[int | None]]]:
    table = run.replays.filter(pc.is_in(run.replays["group_id"], pa.array(ids, pa.int64()))).sort_by("step")
    out: dict[int, list[list[int | None]]] = {}
    for row in table.select(["group_id", "step", "age"]).to_pylist():
        out.setdefault(row["group_id"], []).append([row["step"], row["age"]])
    return {k: v[:MOST_USES] for k, v in out.items()}


def _by_group(table: pa.Table) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    out: dict[int, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        out.setdefault(int(row["group_id"]), []).append(row)
    for id_, rows in out.items():
        yield id_, sorted(rows, key=lambda r: r.get("row") or 0)


def _group(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = rows[0]
    answers = [
        {
            "text": cut(r.get("text")),
            "score": _short(r.get("score")),
            "correct": _short(r.get("correct")),
            "reason": r.get("reason"),
            "tokens": r.get("response_tokens"),
            "ended": r.get("ended"),
            "advantage": _short(r.get("advantage")),
        }
        for r in rows
    ]
    out: dict[str, Any] = to_plain(
        {
            "task": first.get("task"),
            "prompt_id": first.get("prompt_id"),
            "slices": {k.removeprefix(SLICE): v for k, v in first.items() if k.startswith(SLICE) and v is not None},
            "prompt": cut(first.get("prompt")),
            "images": [str(n) for n in first.get("images") or ()],
            "answers": answers,
        }
    )
    return out


def _short(x: Any) -> Any:
    return float(f"{x:.6g}") if isinstance(x, float) else x


def cut(text: Any) -> str:
    """At most MOST_CHARS of it, and if that is not all, a mark that says so."""
    text = text if isinstance(text, str) else ""
    if len(text) <= MOST_CHARS:
        return text
    return f"{text[:MOST_CHARS]}… [cut: {MOST_CHARS:,} of {len(text):,} characters are shown]"
