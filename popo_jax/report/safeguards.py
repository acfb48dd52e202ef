"""Safeguards and limits: how often each held something back, what verifiers said, and what looks bought rather than earned."""

from __future__ import annotations

from typing import Any

import numpy as np

from popo_jax.report.frame import Figure, Section, Series, Table
from popo_jax.report.limits import settings
from popo_jax.report.markers import Marker, best_marker
from popo_jax.report.read import Run
from popo_jax.report.slices import coded, number
from popo_jax.report.suspicions import divergence, right_rows, same_rows, short_rows

REASONS, SHOWN, BINS = 30, 8, 100
"""Rows of the table of verdicts; reasons and bins of the figure."""
FAILURES = {
    "timeout": ("timeout",),
    "memory limit": ("memory",),
    "crash": ("worker exited", "worker wrote nonsense"),
    "exception": ("verifier error",),
}
"""Beginnings of a verdict's reason that are the verifier's fault and not the answer's."""


EXAMPLES, EXAMPLE, LOOKED_AT = 3, 300, 30
"""Answers of a kind to read, characters of each, answers looked at for them."""


def section(run: Run) -> Section:
    """Id "safeguards"."""
    tables, notes = [settings(run)], []
    figures: tuple[Figure, ...] = ()
    if len(run.samples):
        tables += [_verdicts(run), _failures(run), _suspicious(run), examples(run)]
        figures = (_over_time(run),)
    else:
        notes.append("No samples were kept: what verifiers said is not known.")
    return Section("safeguards", "Safeguards and limits", figures, tuple(t for t in tables if t.rows), tuple(notes))


def _verdicts(run: Run) -> Table:
    reason, reasons = coded(run.samples["reason"])
    task, tasks = coded(run.samples["task"])
    score, width = number(run.samples["score"]), len(tasks) + 1
    pair = (reason + 1) * width + task + 1
    n = np.bincount(pair)
    finite = np.isfinite(score)
    total = np.bincount(pair[finite], score[finite], minlength=len(n))
    scored = np.bincount(pair[finite], minlength=len(n))
    order = [int(i) for i in np.argsort(-n, kind="stable") if n[i]]
    rows: list[tuple[Any, ...]] = []
    for i in order[:REASONS]:
        names = ("(none)", *reasons)[i // width], ("(none)", *tasks)[i % width]
        mean = float(total[i] / scored[i]) if scored[i] else None
        rows.append((*names, int(n[i]), float(n[i] / len(reason)), mean))
    rest = order[REASONS:]
    if rest:
        mean = float(total[rest].sum() / scored[rest].sum()) if scored[rest].sum() else None
        rows.append((f"({len(rest)} others)", "", int(n[rest].sum()), float(n[rest].sum() / len(reason)), mean))
    columns = ("reason", "task", "responses", "share", "mean score")
    return Table("safeguards/verdicts", "What verifiers said", columns, tuple(rows), "Of every response sampled in training.")


def _over_time(run: Run) -> Figure:
    """Shares of the responses of a bin of steps."""
    reason, reasons = coded(run.samples["reason"])
    steps, rank = np.unique(run.samples["step"].to_numpy(), return_inverse=True)
    bins = min(BINS, len(steps))
    at = rank * bins // len(steps)
    names = ["(none)", *(str(r) for r in reasons)]
    counts = np.zeros((bins, len(names)))
    np.add.at(counts, (at, reason + 1), 1)
    shares = counts / counts.sum(axis=1, keepdims=True)
    order = [int(i) for i in np.argsort(-counts.sum(axis=0), kind="stable") if counts[:, i].any()]
    first = [int(steps[np.searchsorted(np.arange(len(steps)) * bins // len(steps), b)]) for b in range(bins)]
    series = [Series(names[i], first, shares[:, i].tolist()) for i in order[:SHOWN]]
    if order[SHOWN:]:
        series.append(Series("others", first, shares[:, order[SHOWN:]].sum(axis=1).tolist()))
    note = "A bin is shown at its first step." if bins < len(steps) else ""
    title = "What verifiers said, over time"
    return Figure(
        "safeguards/verdicts-over-time", title, "area", "step", "share of responses", tuple(series), note=note, percent=True
    )


def failures(run: Run) -> dict[str, int]:
    """Verdicts that are the verifier's fault, by kind."""
    reason, reasons = coded(run.samples["reason"])
    n = np.bincount(reason + 1, minlength=len(reasons) + 1)[1:]
    return {k: sum(int(c) for c, r in zip(n, reasons, strict=True) if _begins(r, words)) for k, words in FAILURES.items()}


def _begins(reason: str, words: tuple[str, ...]) -> bool:
    """The word is the whole reason, or what stands before a bracket or colon."""
    return any(reason == w or reason.startswith((f"{w} (", f"{w}:")) for w in words)


def _failures(run: Run) -> Table:
    n = len(run.samples)
    rows = tuple((kind, count, count / n) for kind, count in failures(run).items())
    note = (
        "The verifier's fault, not the answer's. Timeouts, memory limits and crashes were tried twice and count as wrong (score "
        "0), so a policy may learn to avoid them, or a right answer goes unpaid; an exception makes its whole group invalid."
    )
    return Table("safeguards/failures", "Verifiers that failed", ("kind", "count", "share"), rows, note)


def _suspicious(run: Run) -> Table:
    right = right_rows(run)
    rows = (
        _of_rows(run, "right, and far shorter than the group's other answers", short_rows(run, right), right),
        _of_rows(run, "the same answer right for five prompts or more", same_rows(run, right), right),
        _divergent(run),
        _marked(best_marker(run)),
    )
    note = (
        "Shares are of right answers. The same answer for many prompts is normal where answers are few values, e.g. single "
        "numbers. A string explains the reward where it separates right from wrong answers across prompts, "
        "also on prompts that it was not found on."
    )
    columns = ("kind", "count", "share", "where", "example")
    return Table("safeguards/suspicious", "Answers worth a look", columns, rows, note)


def _of_rows(run: Run, kind: str, rows: np.ndarray, right: np.ndarray) -> tuple[Any, ...]:
    at = np.flatnonzero(rows)
    if not len(at):
        return (kind, 0, 0.0 if right.any() else None, "", "")
    step = run.samples["step"].to_numpy()[at]
    where = f"steps {step.min()} to {step.max()}" if step.min() < step.max() else f"step {step.min()}"
    return (kind, len(at), len(at) / int(right.sum()), where, text_at(run, int(at[-1])))


def _divergent(run: Run) -> tuple[Any, ...]:
    kind, d = "reward rose while held-out accuracy fell", divergence(run)
    if d is None:
        return (kind, 0, None, "", "")
    (r0, r1), (a0, a1) = d.reward, d.accuracy
    says = f"reward {r0:.3g} to {r1:.3g}, accuracy {a0:.1%} to {a1:.1%} of {d.problems} problems"
    return (kind, 1, None, "first to last quarter of the run", says)


def _marked(m: Marker | None) -> tuple[Any, ...]:
    kind = "one string explains the reward"
    if m is None:
        return (kind, 0, None, "", "")
    where = (
        f"from step {m.first}: precision {m.precision:.1%}, recall {m.recall:.1%} on {m.right} right and {m.wrong} wrong answers"
    )
    return (kind, round(m.recall * m.right), m.recall, where, repr(m.text))


def examples(run: Run) -> Table:
    """safeguards/examples: the newest answers of each kind worth a look, of different prompts, to read."""
    right, m = right_rows(run), best_marker(run)
    kinds = {"far shorter than its group's": short_rows(run, right), "the same for many prompts": same_rows(run, right)}
    found: list[tuple[Any, ...]] = []
    step, prompt, score = run.samples["step"].to_numpy(), run.samples["prompt_id"], number(run.samples["score"])
    if m is not None:
        kinds[f"has {m.text!r}"] = right & (step == step.max())
    for kind, rows in kinds.items():
        seen: set[Any] = set()
        for row in np.flatnonzero(rows)[::-1][:LOOKED_AT].tolist():
            id_, text = prompt[row].as_py(), text_at(run, row, most=EXAMPLE)
            if id_ in seen or (m is not None and kind.startswith("has ") and m.text not in text):
                continue
            seen.add(id_)
            found.append((kind, int(step[row]), id_, text_at(run, row, "prompt", EXAMPLE), text, float(score[row])))
            if len(seen) == EXAMPLES:
                break
    columns = ("kind", "step", "prompt id", "prompt", "answer", "score")
    note = "All scored right. Whether rightly so is for a reader to say."
    return Table("safeguards/examples", "Answers to read", columns, tuple(found), note)


def text_at(run: Run, row: int, column: str = "text", most: int = 120) -> str:
    """The answer (or prompt) of a row of run.samples, at most `most` characters of it; "" if it cannot be read."""
    steps = run.samples["step"].to_numpy()
    step = int(steps[row])
    table = run.texts("samples", step)
    if table is None or column not in table.column_names:
        return ""
    at = row - int(np.searchsorted(steps, step))
    text = str(table[column][at].as_py() or "") if at < len(table) else ""
    return text if len(text) <= most else text[: most - 1] + "…"
