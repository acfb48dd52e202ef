"""The account of one run, or of several side by side: findings, sections, what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from popo_jax.report import compare, correction, findings, learning, provenance, safeguards, samples, training_data
from popo_jax.report.card import card
from popo_jax.report.frame import Finding, Section
from popo_jax.report.read import Run

SECTIONS = (learning.section, correction.section, training_data.section, safeguards.section, samples.section, provenance.section)


@dataclass(frozen=True)
class Account:
    title: str
    runs: tuple[str, ...]
    """Their directories."""
    findings: tuple[Finding, ...]
    sections: tuple[Section, ...]
    missing: tuple[str, ...]
    """Sentences."""


def model_card(run: Run, step: int | None = None) -> str:
    """For the weights after `step` (None: the last)."""
    made = (learning.section, training_data.section, safeguards.section, provenance.section)
    return card(run, [s(run) for s in made], findings.findings(run), step)


def account(runs: Sequence[Run]) -> Account:
    """Of several runs the comparison and every run's findings; everything of one by itself.

    Errors: none; what a run lacks is missing.
    """
    paths = tuple(str(r.path) for r in runs)
    if len(runs) == 1:
        (run,) = runs
        return Account(run.name, paths, findings.findings(run), tuple(s(run) for s in SECTIONS), run.missing)
    found = [replace(f, sentence=f"{r.name}: {f.sentence}", section="compare") for r in runs for f in findings.findings(r)]
    missing = [f"{r.name}: {m}" for r in runs for m in r.missing]
    return Account(f"{len(runs)} runs", paths, tuple(found), (compare.section(runs),), tuple(missing))
