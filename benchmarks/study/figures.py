"""The study's figures. Their numbers are series in figures.json; each PNG carries the digest of the series it was drawn from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.plan import ADOPTED, MAIN, OTHERS
from benchmarks.study.results import Key, Run, accuracy, grid, load, responses

FOUR = ("grpo", "grpo-filter", "dapo", "popo")
ABLATIONS = ("popo", "popo-ineff", "popo-stale", "popo-pi-old", "popo-behav", "popo-kl")
MEASURES = {
    "groups/effective": "effective groups",
    "replay/age_mean": "replay age, updates",
    "weight/ess": "ESS of replayed rows",
}
SMOOTH = 20
"""Steps a measure is averaged over."""

Figure = dict[str, dict[str, dict[str, list]]]
"""Panel title -> curve name -> x, y, low, high."""


def figures(folder: Path) -> dict[str, Figure]:
    """File stem -> its series, from the raw results."""
    found = load(folder)
    out: dict[str, Figure] = {}
    for task in (MAIN, *OTHERS):
        of = {a: runs for a in (*FOUR, ADOPTED) if (runs := found.get((task, a, 8)))}
        if of:
            out[task] = _accuracy(of)
    of = {a: runs for a in ABLATIONS if (runs := found.get((MAIN, a, 8)))}
    if of:
        out["ablations"] = {"accuracy, % against steps": {a: _curve(grid(r), _smooth_accuracy(r)) for a, r in of.items()}}
        out["ablations"] |= {title: _measures(of, key) for key, title in MEASURES.items()}
    if wall := _wall(found):
        out["wall_time"] = {"accuracy, % against seconds, alone on the machine": wall}
    return out


def _accuracy(of: Mapping[str, Sequence[Run]]) -> Figure:
    curves = {a: _smooth_accuracy(runs) for a, runs in of.items()}
    generated = {a: responses(runs).mean(axis=0) / 1000 for a, runs in of.items()}
    panels: Figure = {
        "accuracy, % against thousand responses": {a: _curve(generated[a], y) for a, y in curves.items()},
        "accuracy, % against steps": {a: _curve(grid(of[a]), y) for a, y in curves.items()},
    }
    return panels | {title: _measures(of, key) for key, title in MEASURES.items()}


def _smooth_accuracy(runs: Sequence[Run]) -> np.ndarray:
    return 100 * accuracy(runs, smooth=True)


def _measures(of: Mapping[str, Sequence[Run]], key: str) -> dict[str, dict[str, list]]:
    """Means over SMOOTH steps; algorithms that never have the measure are left out."""
    out = {}
    for name, runs in of.items():
        n = min(len(run.rows) - 1 for run in runs) // SMOOTH
        columns = np.stack([run.column(key)[: n * SMOOTH] for run in runs]).reshape(len(runs), n, SMOOTH)
        counts = (~np.isnan(columns)).sum(axis=2)
        y = np.where(counts > 0, np.nansum(columns, axis=2) / np.maximum(counts, 1), np.nan)
        if counts.any():
            out[name] = _curve(SMOOTH * (np.arange(n) + 1), y)
    return out


def _wall(found: Mapping[Key, Sequence[Run]]) -> dict[str, dict[str, list]]:
    out = {}
    for (task, algorithm, _), runs in found.items():
        if task == "solo":
            seconds = np.concatenate([[0], np.nancumsum(runs[0].column("time/step"))])
            out[algorithm] = _curve(seconds[grid(runs)], _smooth_accuracy(runs))
    return out


def _curve(x: np.ndarray, y: np.ndarray) -> dict[str, list]:
    """Mean over seeds and the range of the seeds, to 5 digits."""
    counted = (~np.isnan(y)).sum(axis=0)
    mean = np.where(counted > 0, np.nansum(y, axis=0) / np.maximum(counted, 1), np.nan)
    low, high = np.nanmin(np.where(counted > 0, y, 0), axis=0), np.nanmax(np.where(counted > 0, y, 0), axis=0)
    keep = counted > 0
    return {k: [float(f"{v:.5g}") for v in np.asarray(a)[keep]] for k, a in (("x", x), ("y", mean), ("low", low), ("high", high))}


def digest(figure: Figure) -> str:
    return hashlib.sha256(json.dumps(figure, sort_keys=True).encode()).hexdigest()


def draw(figure: Figure, path: Path) -> None:
    """One PNG, a panel each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted({name for panel in figure.values() for name in panel})
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    columns = min(3, len(figure))
    lines = -(-len(figure) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.4 * lines), squeeze=False, layout="constrained")
    for axis, (title, panel) in zip(axes.flat, figure.items(), strict=False):
        what, _, against = title.partition(" against ")
        for name, c in panel.items():
            axis.plot(c["x"], c["y"], label=name, color=colours[name], linewidth=1.6)
            axis.fill_between(c["x"], c["low"], c["high"], color=colours[name], alpha=0.12, linewidth=0)
        axis.set_xlabel(against or "steps")
        axis.set_title(what, fontsize=10)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    for axis in list(axes.flat)[len(figure) :]:
        axis.axis("off")
    fig.savefig(path, dpi=80, metadata={"Description": digest(figure), "Software": None})
    plt.close(fig)


def digest_in(path: Path) -> str:
    """The digest a PNG carries. Errors: ValueError if it carries none."""
    import struct

    data, at = path.read_bytes(), 8
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        text = data[at + 8 : at + 8 + size]
        if kind == b"tEXt" and text.startswith(b"Description\0"):
            return text.split(b"\0", 1)[1].decode()
        at += size + 12
    raise ValueError(f"{path} carries no digest")


def write(folder: Path, out: Path) -> dict[str, Any]:
    """figures.json and a PNG for each figure into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    made = figures(folder)
    (out / "figures.json").write_text(json.dumps(made, indent=None, sort_keys=True) + "\n")
    for name, figure in made.items():
        draw(figure, out / f"{name}.png")
    return made
