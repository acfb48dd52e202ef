"""Mathematics problems from files and hub data sets: which column is what, the answer inside a solution, what is held out.

Known shapes: (problem, answer) as in DeepScaleR, (problem, solution) as in MATH and NuminaMath, (question, answer) as in GSM8K,
(question, final_answer) as in OlympiadBench, whose answers are lists and whose `context`, if there is one, comes first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from popo_jax.task_config import MathConfig, TaskConfig
from popo_jax.tasks import files, sources
from popo_jax.tasks.files import Row, Split
from popo_jax.types import UserError

SHAPES = (
    *(("problem", "answer"), ("problem", "solution")),
    *(("question", "answer"), ("question", "final_answer"), ("question", "solution")),
)
_PLAIN = re.compile(r"-?[0-9]+(\.[0-9]+)?(/[0-9]+)?|-?\\d?frac\{[0-9]+\}\{[0-9]+\}|-?[0-9]{1,3}(,[0-9]{3})+")
"""Answers that math-verify is known to parse."""
_DELIMITED = re.compile(r"\$|\\boxed|\\\(|\\\[")
_read: set[str] = set()
"""Answers found readable, in this process."""


def read(config: TaskConfig, problem_id: Callable[[Mapping[str, Any]], str]) -> Split | None:
    """Training and held-out problems with `problem` and `answer`, or None if the config names no source.

    With one source, `math.eval_problems` are held out, those whose seeded hash of the id is lowest; a problem that occurs
    twice is on one side. Errors: UserError, also if two sources share problems.
    """
    problems = partial(_problems, c=config.math, checked=config.verifier is None)
    return sources.read(config, config.math, problems, problem_id)


def read_all(config: TaskConfig, problem_id: Callable[[Mapping[str, Any]], str]) -> list[Row]:
    """Every problem of the training source, in order; of those that occur twice the first. For evaluation alone.

    Errors: UserError, also if the config names no source.
    """
    source = sources.table(config, config.train_file, config.math, config.math.train_split)
    if source is None:
        raise UserError("expected a file or a data set of mathematics problems, got neither")
    found: dict[str, Row] = {}
    problems = partial(_problems, c=config.math, checked=config.verifier is None)
    for p in sources.carried(problems, config.slices)(*source):
        found.setdefault(problem_id(p), p)
    return list(found.values())


def _problems(name: str, table: Iterable[tuple[str, Row]], *, c: MathConfig, checked: bool) -> list[Row]:
    table = list(table)
    question, answer = _columns(name, list(table[0][1]), c)
    problems = []
    for place, row in table:
        for column in (question, answer):
            if row.get(column) is None:
                raise UserError(f"{place}: column {column} is missing or empty, found {files.shown(list(row))}")
        text = row[question]
        files.need(isinstance(text, str) and bool(text.strip()), f"{place}: {question}", "a text that is not blank", text)
        context = row.get("context") if answer == "final_answer" else None
        text = f"{context.strip()}\n{text}" if isinstance(context, str) and context.strip() else text
        problems.append({"problem": text.strip(), "answer": answer_of(row[answer], place, answer)})
    if checked:
        refuse_unreadable([(place, p["answer"]) for (place, _), p in zip(table, problems, strict=True)])
    return problems


def _columns(name: str, found: list[str], c: MathConfig) -> tuple[str, str]:
    fitting = [(q, a) for q, a in ((c.problem_column or q, c.answer_column or a) for q, a in SHAPES) if q in found and a in found]
    if not fitting:
        known = ", ".join(dict.fromkeys(f"{c.problem_column or q} and {c.answer_column or a}" for q, a in SHAPES))
        raise UserError(
            f"{name} must have columns {known} (or those of math.problem_column, math.answer_column), found {', '.join(found)}"
        )
    return fitting[0]


def answer_of(value: object, place: str, column: str) -> str:
    """The final answer: after "####", inside the last \\boxed{}, else the whole text. Errors: UserError.

    A column named `solution` must have one of the two. A list of answers is one, commas between.
    """
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) for v in value):
        value = ", ".join(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    files.need(isinstance(value, str), f"{place}: {column}", "text or a number", value)
    text = str(value)
    _, mark, after = text.rpartition("####")
    boxed = last_boxed(text)
    if not mark and boxed is None and column == "solution":
        raise UserError(f"{place}: {column} must have its answer in \\boxed{{}}, got {files.shown(text[-60:])}")
    answer = (after if mark else text if boxed is None else boxed).strip()
    files.need(bool(answer), f"{place}: {column}", "an answer that is not blank", value)
    return answer


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} (or \\fbox), brackets matched; None if there is none or it stays open."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    depth = 0
    for i in range(text.find("{", start), len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[text.find("{", start) + 1 : i]
    return None


def delimited(answer: str) -> str:
    """As math-verify reads it: a formula needs a box or dollars around it, a number does not."""
    number = _PLAIN.fullmatch(answer) and "\\" not in answer
    return answer if number or _DELIMITED.search(answer) else f"\\boxed{{{answer}}}"


def refuse_unreadable(answers: list[tuple[str, str]]) -> None:
    """Numbers and simple fractions pass at once, others are parsed in a pool's workers, each text once a process.

    Errors: UserError for the first that math-verify cannot parse.
    """
    from popo_jax.tasks.pool import Pool  # which knows the tasks, this one among them

    open_ = list({a: None for _, a in answers if not _PLAIN.fullmatch(a) and a not in _read})
    if not open_:
        return
    with Pool({"math": "popo_jax.tasks.mathematics:parses"}) as pool:
        verdicts = pool([("math", delimited(a), {}) for a in open_])
    _read.update(a for a, v in zip(open_, verdicts, strict=True) if v.correct == 1)
    for place, answer in answers:
        if answer in open_ and answer not in _read:
            raise UserError(f"{place}: the answer must be one that math-verify parses, got {files.shown(answer)}")
