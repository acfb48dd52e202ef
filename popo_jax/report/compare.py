"""Several runs side by side: runs that differ in their seed alone are one line with a band, and one row of the table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from popo_jax.report.curves import FEW, band, hours, resampled
from popo_jax.report.frame import Figure, Section, Series, Table
from popo_jax.report.provenance import dotted
from popo_jax.report.read import Run

OTHER = ("seed", "run_dir", "fingerprints", "checkpoint", "loggers", "batch.micro_batch", "batch.memory_gb", "verifier")
"""Settings in which runs of one line may differ."""
MOST_KEYS = 3
"""Differing settings that a line's name tells."""
MOST_BESIDE = 8
"""Settings that differ with the algorithm which the note names."""
CURVES = (
    ("accuracy", "eval/accuracy", "Accuracy on held-out problems", "accuracy", True),
    ("reward", "reward/mean", "Reward in training", "mean of the batch", False),
    ("effective", "groups/effective", "Groups with a signal", "share", True),
    ("entropy", "entropy", "Entropy of the policy", "nats a token", False),
    ("length", "response/length", "Length of responses", "tokens", False),
)


def section(runs: Sequence[Run]) -> Section:
    lines = named(runs)
    figures = tuple(f for c in CURVES if (f := _figure(lines, *c)).series)
    seeds = sorted({len(group) for group in lines.values()})
    notes = [f"Bands: least to most over the seeds where there are under {FEW}, else the mean -+ 1.96 standard errors."]
    notes += ["A line of one run has no band: nothing is known of other seeds."] if 1 in seeds else []
    return Section("compare", "The runs side by side", figures, (table(lines),), (*notes, *_beside(runs), *_cautions(lines)))


def _cautions(lines: Mapping[str, Sequence[Run]]) -> list[str]:
    """What of the runs of a line does not belong together."""
    out = []
    for label, group in lines.items():
        ends = {int(r.metrics.step.max()) if len(r.metrics.rows) else 0 for r in group}
        if len(ends) > 1:
            out.append(
                f"{label}: its runs ended at different steps ({min(ends)} to {max(ends)}); later points are of fewer runs."
            )
        if len({str(r.fingerprints.get("data")) for r in group}) > 1:
            out.append(f"{label}: its runs were trained on different data (fingerprints).")
        if len({r.setting("seed") for r in group}) < len(group):
            out.append(f"{label}: a seed occurs twice, so that its runs are no independent ones.")
        if not all(r.metrics.has("eval/accuracy") for r in group):
            out.append(f"{label}: a run without an evaluation is not in its accuracy.")
    return out


def named(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by what they differ in: the algorithm, and other settings with their values if these differ too.

    Runs of one line are equal in all settings that count, those that its name has no room for too.
    """
    settings = [_settings(r) for r in runs]
    differ = _telling(_differing(settings), settings)
    shown = _apart(differ, settings)
    lines: dict[tuple[str, ...], list[Run]] = {}
    names: dict[tuple[str, ...], str] = {}
    for run, own in zip(runs, settings, strict=True):
        line = tuple(str(own.get(k)) for k in ("algorithm.name", *differ))
        parts = [f"{k} {own.get(k)}" for k in shown]
        parts += [f"{len(differ) - len(shown)} more"] if len(differ) > len(shown) else []
        name = ", ".join([str(own.get("algorithm.name", "?")), *parts])
        if line not in names:
            same = sum(n == name or n.startswith(f"{name} (") for n in names.values())
            names[line] = f"{name} ({same + 1})" if same else name
        lines.setdefault(line, []).append(run)
    return {names[line]: group for line, group in lines.items()}


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Besides the algorithm, by name."""
    keys = {k for s in settings for k in s} - {"algorithm.name"}
    return sorted(k for k in keys if len({str(s.get(k)) for s in settings}) > 1)


def _apart(keys: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """At most MOST_KEYS of them, each the one that tells most runs apart that those before it do not."""
    found: list[str] = []

    def told(key: str) -> int:
        return len({tuple(str(s.get(k)) for k in ("algorithm.name", *found, key)) for s in settings})

    for _ in range(min(MOST_KEYS, len(keys))):
        found.append(max((k for k in keys if k not in found), key=told))
    return sorted(found)


def _beside(runs: Sequence[Run]) -> list[str]:
    """A sentence on settings that differ between algorithms alone, which a line's name leaves out."""
    settings = [_settings(r) for r in runs]
    differ = _differing(settings)
    told = _telling(differ, settings)
    keys = [k for k in differ if k not in told]
    if not keys:
        return []
    of = {str(s.get("algorithm.name", "?")): s for s in settings}
    parts = [f"{k} (" + ", ".join(f"{name}: {s.get(k)}" for name, s in of.items()) + ")" for k in keys[:MOST_BESIDE]]
    parts += [f"{len(keys) - MOST_BESIDE} more"] if len(keys) > MOST_BESIDE else []
    return [f"With their algorithm the lines differ in {'; '.join(parts)}: by its preset, or by what was set."]


def _settings(run: Run) -> dict[str, Any]:
    return {k: v for k, v in dotted(run.config) if not any(k == o or k.startswith(f"{o}.") for o in OTHER)}


def _telling(keys: Iterable[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that differ among runs of one algorithm: what an algorithm's preset decides is told by its name."""

    def tells(key: str) -> bool:
        values: dict[Any, set[str]] = {}
        for s in settings:
            values.setdefault(s.get("algorithm.name"), set()).add(str(s.get(key)))
        return any(len(v) > 1 for v in values.values())

    return [k for k in keys if tells(k)]


def _figure(lines: Mapping[str, Sequence[Run]], name: str, key: str, title: str, y: str, percent: bool) -> Figure:
    found = []
    for label, group in lines.items():
        steps = sorted({int(s) for r in group for s in r.metrics.step[np.isfinite(r.metrics[key])]})
        if steps:
            mean, low, high = band(np.array([resampled(r, key, steps) for r in group]))
            has = bool(np.isfinite(low).any())
            over = _places(group, steps)
            found.append(Series(label, steps, mean.tolist(), low.tolist() if has else None, high.tolist() if has else None, over))
    return Figure(f"compare/{name}", title, "line", "step", y, tuple(found), percent=percent)


def _places(group: Sequence[Run], steps: Sequence[int]) -> dict[str, list[float]]:
    """Responses, tokens and hours at these steps, mean over the runs."""
    out = {}
    for label, key in (("responses", "rollouts_total"), ("tokens", "tokens_generated_total")):
        x = np.array([np.where(np.array(steps) == 0, 0.0, resampled(r, key, steps)) for r in group])
        out[label] = band(x)[0].tolist()
    clock = [dict(zip(r.metrics.step.tolist(), hours(r.metrics).tolist(), strict=True)) for r in group]
    out["hours"] = band(np.array([[c.get(s, np.nan) for s in steps] for c in clock]))[0].tolist()
    return out


def table(lines: Mapping[str, Sequence[Run]]) -> Table:
    """compare/table: accuracy is the mean of a run's last two evaluations."""
    rows = []
    for label, group in lines.items():
        last = np.array([_last_two(r) for r in group])
        totals = np.array([[r.metrics.last(k) for k in ("rollouts_total", "tokens_generated_total")] for r in group])
        cost = band(totals)[0].tolist()
        took = float(np.mean([hours(r.metrics)[-1] if len(r.metrics.rows) else 0.0 for r in group]))
        last = last[np.isfinite(last)] if np.isfinite(last).any() else last
        ends = (float(last.min()), float(last.max()))
        seeds = ", ".join(str(r.setting("seed", "?")) for r in group)
        rows.append((label, seeds, float(last.mean()), *ends, *cost, took))
    columns = ("runs", "seeds", "accuracy", "least", "most", "responses", "tokens", "hours")
    note = "Accuracy: held out, mean of the last two evaluations, mean over seeds. Responses, tokens, hours: mean over seeds."
    return Table("compare/table", "At the end", columns, tuple(rows), note)


def _last_two(run: Run) -> float:
    x = run.metrics["eval/accuracy"]
    x = x[np.isfinite(x)]
    return float(x[-2:].mean()) if len(x) else np.nan
