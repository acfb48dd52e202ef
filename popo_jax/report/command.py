"""`popo report RUN [RUN ...]`: the page, or the same figures as JSON, or a model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from popo_jax.report.account import account, model_card
from popo_jax.report.frame import to_plain
from popo_jax.report.page import render
from popo_jax.report.read import read
from popo_jax.types import UserError


@dataclass(frozen=True)
class ReportArgs:
    """The account of a run, as one HTML file that needs no network; of several runs, their comparison."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run directories: finished, still going, or cut short."""
    out: Path | None = None
    """Where to. None: report.html in the run's directory, or here for several runs; --json and --card: to the console."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """The same figures for programs."""
    card: tyro.conf.FlagCreatePairsOff[bool] = False
    """A model card in Hugging Face's format, of one run."""


def command(a: ReportArgs) -> None:
    """Errors: UserError for no run, a path that is no run directory, --json with --card, --card of several runs."""
    if not a.runs:
        raise UserError("popo report: expected at least one run directory, got none")
    if a.card and (a.json or len(a.runs) > 1):
        raise UserError(f"--card is of one run and without --json, got {len(a.runs)} runs{' and --json' if a.json else ''}")
    runs = [read(path) for path in a.runs]
    if a.card:
        return _written(model_card(runs[0]), a.out)
    found = account(runs)
    if a.json:
        return _written(json.dumps(to_plain(found), indent=1), a.out)
    page = render(found.title, found.findings, found.sections, found.missing, runs=runs, checked=found.checked)
    _written(page, out := a.out or _default(a.runs))
    names = list(dict.fromkeys(f.name for f in found.findings))
    print(
        f"Report: {out} ({len(page.encode()) / 1e6:.1f} MB); "
        + (f"look at: {', '.join(names)}" if names else "nothing to worry about")
    )


def _written(text: str, out: Path | None) -> None:
    """To a file, or the console."""
    if out is None:
        print(text)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")


def _default(runs: Sequence[str]) -> Path:
    return Path(runs[0]) / "report.html" if len(runs) == 1 else Path("report.html")
