"""A model card in Hugging Face's format: YAML that the hub reads, then the account of the run in short."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from popo_jax.report.frame import Finding, Section, Table
from popo_jax.report.read import Run

TABLES = ("learning/summary", "data/gains", "data/slices", "data/prompts", "safeguards/settings", "provenance/cost")
"""Of the report, those that a card has; the settings that bound the run with how often each fired."""
MOST_ROWS = 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def card(
    run: Run,
    sections: Sequence[Section],
    findings: Sequence[Finding],
    checked: Sequence[str] = (),
    step: int | None = None,
    *,
    adapter: bool = False,
) -> str:
    """Markdown with a YAML head, for the weights after `step` (None: the last); adapter: LoRA's alone. checked: names of what was
    looked for. Text of the run makes no markup."""
    name = str(run.setting("algorithm.name", "popo"))
    lines = ["---", yaml.safe_dump(_head(run, step, adapter), sort_keys=False, allow_unicode=True).strip(), "---", ""]
    lines += [f"# {_plain(run.name)}", "", _summary(run, name, step), ""]
    lines += ["## What to know first", ""]
    lines += [f"- **{_plain(f.name)}** ({f.severity}): {_plain(f.sentence)} {_plain(f.advice)}" for f in findings]
    looked = ", ".join(n.replace("-", " ") for n in checked) or "nothing could be checked"
    lines += [] if findings else [f"- The account of the training found nothing to worry about. Looked for: {looked}."]
    tables = {t.id: t for s in sections for t in s.tables}
    for id_ in TABLES:
        if id_ in tables and tables[id_].rows:
            lines += ["", *_table(tables[id_])]
    lines += ["", "## Intended use and limits", "", _limits(run), ""]
    lines += ["## How it was made", "", *_table(_made(run))[2:]]
    lines += ["" if not run.missing else "\nNot in this account: " + " ".join(map(_plain, run.missing))]
    return "\n".join(lines).rstrip() + "\n"


def _head(run: Run, step: int | None, adapter: bool) -> dict[str, Any]:
    base, library = run.setting("policy.path"), "peft" if adapter else "transformers"
    head: dict[str, Any] = {"library_name": library, "tags": ["reinforcement-learning", "rlvr", "popo"]}
    head["tags"] += [str(run.setting("algorithm.name", "popo"))] if run.setting("algorithm.name") != "popo" else []
    if isinstance(base, str) and _HUB_ID.fullmatch(base) and not Path(base).exists():  # a folder here is nobody's model there
        head |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    sets = [own.get("dataset") for t in run.task_configs if isinstance(own := t.get(t["name"]), dict)]
    if any(sets):
        head["datasets"] = sorted({str(s) for s in sets if s})
    score = run.summary.get("eval/accuracy/last_two")
    if isinstance(score, (int, float)) and step in (None, _last(run)):  # it is the last weights'
        metric = [{"type": "accuracy", "name": "held-out accuracy, mean of the last two evaluations", "value": round(score, 4)}]
        result = {
            "task": {"type": "text-generation"},
            "dataset": {"name": "+".join(run.tasks), "type": "held-out"},
            "metrics": metric,
        }
        head["model-index"] = [{"name": run.name, "results": [result]}]
    return head


def _last(run: Run) -> int | None:
    return int(run.metrics.step.max()) if len(run.metrics.rows) else None


def _summary(run: Run, name: str, step: int | None) -> str:
    base = run.setting("policy.path") or "a small policy made from nothing, warm-started"
    tasks = ", ".join(run.tasks) or "unknown tasks"
    last = _last(run)
    done = step if step is not None else last
    told = f"step {done}" if done == last or last is None else f"step {done} of {last}, whose account this is"
    return (
        f"{_plain(str(base))}, fine-tuned by reinforcement learning with verifiable rewards ({_plain(name)}) on {_plain(tasks)} "
        f"with popo_jax, seed {run.setting('seed', '?')}. The weights are those after {told}."
    )


def _limits(run: Run) -> str:
    tasks = ", ".join(run.tasks) or "the tasks of the run"
    return (
        f"Trained to be right on {_plain(tasks)} by a verifier's judgement and on nothing else: what the verifier does not look "
        "at (style, safety, other tasks) was not trained and may have changed. Accuracy is that on held-out problems of the same "
        "source; it says little about others."
    )


def _made(run: Run) -> Table:
    last: Any = run.sessions[-1] if run.sessions else {}
    rows = [("popo-jax", last.get("code")), ("commit", last.get("git")), ("seed", run.setting("seed"))]
    rows += [(f"fingerprint of {k}", v) for k, v in run.fingerprints.items()]
    return Table("card/made", "How it was made", ("what", "value"), tuple((k, v) for k, v in rows if v is not None))


def _table(t: Table) -> list[str]:
    out = [f"## {_plain(t.title)}", "", "| " + " | ".join(map(_plain, t.columns)) + " |", "|" + "---|" * len(t.columns)]
    out += ["| " + " | ".join(_cell(v) for v in row) + " |" for row in t.rows[:MOST_ROWS]]
    out += [f"\n{len(t.rows) - MOST_ROWS} more rows are in the report."] if len(t.rows) > MOST_ROWS else []
    return out + (["", _plain(t.note)] if t.note else [])


def _cell(v: Any) -> str:
    if v is None or v != v:
        return "-"
    return f"{v:.4g}" if isinstance(v, float) else _plain(str(v))


def _plain(text: str) -> str:
    """As it stands, on one line: no HTML, no table cell, no emphasis or link of its own."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", text)
