"""The account of one run, or of several side by side: findings, sections, what is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from popo_jax.report import compare, correction, findings, learning, provenance, safeguards, samples, training_data
from popo_jax.report.card import card
from popo_jax.report.frame import Finding, Section
from popo_jax.report.read import Run

SECTIONS: Mapping[str, tuple[str, Callable[[Run], Section]]] = {
    "learning": ("Is it learning?", learning.section),
    "correction": ("Is the off-policy correction healthy?", correction.section),
    "data": ("What was it trained on?", training_data.section),
    "safeguards": ("Safeguards and limits", safeguards.section),
    "samples": ("Samples", samples.section),
    "provenance": ("Provenance and cost", provenance.section),
}
CARD = ("learning", "data", "safeguards", "provenance")
"""What a model card is made from."""


@dataclass(frozen=True)
class Account:
    title: str
    runs: tuple[str, ...]
    """Their directories."""
    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    """What was looked for: what the runs' files allow."""
    sections: tuple[Section, ...]
    missing: tuple[str, ...]
    """Sentences."""


def model_card(run: Run, step: int | None = None, *, adapter: bool = False) -> str:
    """For the weights after `step` (None: the last); adapter: LoRA's alone."""
    return card(run, [made(run, id_) for id_ in CARD], findings.findings(run), findings.checked(run), step, adapter=adapter)


def made(run: Run, id_: str) -> Section:
    """A section; of a run that nobody thought of, the sentence that it could not be made."""
    title, section = SECTIONS[id_]
    try:
        return section(run)
    except Exception as e:  # the rest of the account is worth showing
        return Section(id_, title, notes=(f"This part could not be made of the run's files ({type(e).__name__}: {e}).",))


def account(runs: Sequence[Run]) -> Account:
    """Of several runs the comparison and every run's findings; everything of one by itself. What a run lacks is missing."""
    paths = tuple(str(r.path) for r in runs)
    if len(runs) == 1:
        (run,) = runs
        return Account(
            run.name, paths, findings.findings(run), findings.checked(run), tuple(made(run, id_) for id_ in SECTIONS), run.missing
        )
    found = [replace(f, sentence=f"{r.name}: {f.sentence}", section="compare") for r in runs for f in findings.findings(r)]
    missing = [f"{r.name}: {m}" for r in runs for m in r.missing]
    of_each = [set(findings.checked(r)) for r in runs]
    looked = tuple(n for n in findings.NAMES if all(n in names for names in of_each))
    return Account(f"{len(runs)} runs", paths, tuple(found), looked, (compare.section(runs),), tuple(missing))
