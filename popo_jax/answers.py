"""Answers on disk: read from a file, graded if they are not, summed up. `popo eval --answers FILE` needs no model and no jax.

A row is one answer. `problem` (text or a number) says what was asked and `correct` (true, false, or a number from 0 to 1; null
where the verifier failed, which counts as wrong) whether it is right. Without `correct` the mathematics task grades `text` by the
given `answer`. Read too, where they are there: task, sample, reason, tokens, truncated.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from popo_jax import metrics
from popo_jax.config import Config
from popo_jax.task_config import TaskConfig
from popo_jax.tasks import files, math_data
from popo_jax.tasks.files import Row
from popo_jax.tasks.graders import Graders
from popo_jax.types import UserError

UNGRADED = "not graded"
"""Reason of an answer whose row has none."""


@dataclass(frozen=True)
class Answer:
    """What counts of one answer."""

    task: str
    problem: str
    correct: float
    """NaN: the verifier failed."""
    reason: str
    sample: int | None = None
    tokens: int | None = None
    truncated: bool | None = None


def read(path: epath.PathLike) -> list[Answer]:
    """The answers of a .jsonl or .parquet file, graded here if its first row has no `correct`.

    Errors: UserError with the line: a column missing, a value of another kind, one sample of a problem twice.
    """
    rows = [(files.place(path, n), row) for n, row in files.read_rows(path, ("problem",))]
    if "correct" not in rows[0][1]:
        rows = _graded(rows)
    answers = [_answer(place, row) for place, row in rows]
    seen: dict[tuple[str, str, int], str] = {}
    for (place, _), a in zip(rows, answers, strict=True):
        if a.sample is not None:
            first = seen.setdefault((a.task, a.problem, a.sample), place)
            if first != place:
                raise UserError(
                    f"{place}: sample {a.sample} of problem {files.shown(a.problem)} must stand once, is in {first} too"
                )
    return answers


def _graded(rows: Sequence[tuple[str, Row]]) -> list[tuple[str, Row]]:
    """Rows of `text` and `answer` with the mathematics task's verdict."""
    jobs, golds = [], []
    for place, row in rows:
        lacking = [name for name in ("text", "answer") if row.get(name) is None]
        if lacking:
            raise UserError(f"{place}: expected a column correct, or text and answer; {lacking[0]} is missing, found {list(row)}")
        files.need(isinstance(row["text"], str), f"{place}: text", "text", row["text"])
        golds.append((place, math_data.answer_of(row["answer"], place, "answer")))
        jobs.append(("math", row["text"], {"answer": math_data.delimited(golds[-1][1])}))
    math_data.refuse_unreadable(golds)
    with Graders(Config(tasks=(TaskConfig(name="math"),))) as grade:
        verdicts = grade(jobs)
    return [
        (place, row | {"score": v.score, "correct": v.correct, "reason": v.reason})
        for (place, row), v in zip(rows, verdicts, strict=True)
    ]


def _answer(place: str, row: Row) -> Answer:
    task, problem, sample = row.get("task"), row["problem"], row.get("sample")
    correct, tokens, truncated, reason = (row.get(name) for name in ("correct", "tokens", "truncated", "reason"))
    if "correct" not in row:
        raise UserError(f"{place}: column correct is missing, found {list(row)}")
    named = isinstance(problem, (str, int)) and not isinstance(problem, bool) and problem != ""
    files.need(named, f"{place}: problem", "text or a whole number", problem)
    files.need(task is None or isinstance(task, str), f"{place}: task", "text", task)
    files.need(sample is None or files.whole(sample, 0, 2**31), f"{place}: sample", "a whole number from 0", sample)
    failed = correct is None or (isinstance(correct, float) and math.isnan(correct))
    files.need(failed or _share(correct), f"{place}: correct", "true, false, null or a number from 0 to 1", correct)
    files.need(tokens is None or files.whole(tokens, 0, 2**31), f"{place}: tokens", "a whole number from 0", tokens)
    files.need(truncated is None or isinstance(truncated, bool), f"{place}: truncated", "true or false", truncated)
    files.need(reason is None or isinstance(reason, str), f"{place}: reason", "text", reason)
    value = math.nan if correct is None or failed else float(correct)
    return Answer(task or "all", str(problem), value, reason or UNGRADED, sample, tokens, truncated)


def _share(x: object) -> bool:
    return isinstance(x, (int, float)) and 0 <= x <= 1


def summary(answers: Sequence[Answer], ks: Sequence[int] | None, where: str) -> dict[str, dict[str, Any]]:
    """For each task, and over "all tasks" if they are several: metrics with their 95 % intervals, truncation, tokens, reasons.

    `ks` None: pass@1, 2, 4, ... up to the fewest samples of a problem, else up to the largest of `ks`, and these themselves; an
    empty `ks`: none.
    Errors: UserError for a k above the samples of any problem.
    """
    sizes = Counter((a.task, a.problem) for a in answers)
    (_, problem), least = min(sizes.items(), key=lambda item: item[1])
    most = least if ks is None else max(ks, default=0)
    if most > least:
        raise UserError(f"{where}: --k must be at most {least}, the samples of problem {files.shown(problem)}, got {most}")
    every = sorted({*metrics.powers(most), *(ks or ())}) if most else []
    tasks = {task: [a for a in answers if a.task == task] for task in dict.fromkeys(a.task for a in answers)}
    if len(tasks) > 1:
        tasks["all tasks"] = list(answers)
    return {task: _summary(some, every) for task, some in tasks.items()}


def _summary(answers: Sequence[Answer], ks: Sequence[int]) -> dict[str, Any]:
    samples: dict[tuple[str, str], list[float]] = {}
    for a in answers:
        samples.setdefault((a.task, a.problem), []).append(0.0 if math.isnan(a.correct) else a.correct)
    values = metrics.measures(list(samples.values()), ks)
    cut = [a.truncated for a in answers if a.truncated is not None]
    tokens = [a.tokens for a in answers if a.tokens is not None]
    return {
        "problems": len(samples),
        "answers": len(answers),
        "metrics": {name: {"value": float(v.mean()), "interval": metrics.interval(v)} for name, v in values.items()},
        "truncated": float(np.mean(cut)) if cut else None,
        "mean_tokens": float(np.mean(tokens)) if tokens else None,
        "verifier_errors": sum(math.isnan(a.correct) for a in answers),
        "reasons": dict(Counter(a.reason for a in answers).most_common()),
    }


def show(found: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """A table: every task's metrics in %, with their intervals; below it what the answers were like."""
    table = Table()
    for name in ("task", "metric", "value", "95 % interval"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, s in found.items():
        for i, (name, m) in enumerate(s["metrics"].items()):
            low, high = m["interval"]
            table.add_row("" if i else task, name, f"{100 * m['value']:.1f} %", f"{100 * low:.1f} to {100 * high:.1f}")
        table.add_section()
    console = Console()
    console.print(title, highlight=False, soft_wrap=True)
    console.print(table)
    for task, s in found.items():
        parts = [f"{s['problems']} problems, {s['answers']} answers"]
        parts += [f"{s['mean_tokens']:.0f} tokens each"] if s["mean_tokens"] is not None else []
        parts += [f"{100 * s['truncated']:.1f} % truncated"] if s["truncated"] is not None else []
        parts += [f"{n} {reason}" for reason, n in list(s["reasons"].items())[:5] if reason != UNGRADED]
        console.print(f"{task}: {', '.join(parts)}", highlight=False)


def command(path: epath.PathLike, *, k: Sequence[int] | None, out: epath.PathLike | None) -> dict[str, dict[str, Any]]:
    """`popo eval --answers FILE`: printed, and kept as OUT/summary.json if a new folder is named."""
    if out is not None and epath.Path(out).exists():
        raise UserError(f"--out {out} must not exist yet")
    found = summary(read(path), k, str(path))
    show(found, str(path))
    if out is not None:
        epath.Path(out).mkdir(parents=True)
        write_summary(epath.Path(out), {"answers": str(path)}, found)
    return found


def write_summary(folder: epath.Path, settings: Mapping[str, Any], found: Mapping[str, Any], **more: Any) -> None:
    """FOLDER/summary.json, whole or not at all."""
    partial = folder / ".summary.partial"
    partial.write_text(json.dumps({"settings": settings, "results": found} | more, indent=2))
    partial.replace(folder / "summary.json")


class Sheet:
    """A file of answers that grows problem by problem, `samples` lines each; cut short, it goes on after the last whole one."""

    def __init__(self, path: epath.PathLike, samples: int):
        self.path, self._samples = epath.Path(path), samples

    def whole(self) -> int:
        """How many problems are answered in full. What lies beyond, a torn line too, is cut off."""
        if not self.path.exists():
            return 0
        data = self.path.read_bytes()
        lines = data.split(b"\n")[:-1]
        n = next((i for i, line in enumerate(lines) if not _is_row(line)), len(lines)) // self._samples
        kept = b"".join(line + b"\n" for line in lines[: n * self._samples])
        if kept != data:
            partial = self.path.parent / f".{self.path.name}.partial"
            partial.write_bytes(kept)
            partial.replace(self.path)
        return n

    def append(self, rows: Sequence[Row]) -> None:
        """Lines, on disk when this returns. NaN is null."""
        lines = [json.dumps({k: _plain(v) for k, v in row.items()}) + "\n" for row in rows]
        with self.path.open("a") as f:
            f.write("".join(lines))
            f.flush()
            os.fsync(f.fileno())


def _plain(v: Any) -> Any:
    return None if isinstance(v, float) and not math.isfinite(v) else v


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def open_folder(folder: epath.PathLike, settings: Mapping[str, Any]) -> epath.Path:
    """Where an evaluation with these settings writes: new, empty, or begun with the same ones, to go on.

    Errors: UserError if something else is there.
    """
    folder, asked = epath.Path(folder), json.loads(json.dumps(settings))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        try:
            found = json.loads((folder / "settings.json").read_text())
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise UserError(f"--out {folder} must be new, empty, or hold an evaluation to go on with, got something else")
        other = next((key for key in {**asked, **found} if asked.get(key) != found.get(key)), None)
        if other is not None:
            got = f"{files.shown(found.get(other))}, not {files.shown(asked.get(other))}"
            raise UserError(
                f"--out {folder} must be new or hold an evaluation of the same settings, got one whose {other} is {got}"
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(asked, indent=2))
    return folder
