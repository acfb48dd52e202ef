"""Visual geometry: a problem with pictures and a numeric answer, from Geometry3k or files, or drawn by the program.

An answer in \\boxed{} is compared as a quantity; what is no number by math-verify, whose work knows no bounds, so that
`grade` runs in the workers of a pool. In a problem's text `<image>` stands where a picture does.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np

from popo_jax.task_config import GeometryConfig, TaskConfig
from popo_jax.tasks import figures, geometry_data, math_data, mathematics, quantities
from popo_jax.tasks.files import Split
from popo_jax.tasks.tags import split_thinking
from popo_jax.types import UserError, Verdict

Problem = Mapping[str, Any]
_BOX = re.compile(r"\\(?:boxed|fbox)\{")
_LISTED = re.compile(r",|;|\b(?:or|and)\b|\\(?:pm|mp)")
_POWER = re.compile(r"\^\s*(?:\{\s*(?:-?\d{1,2}|-?\d?[a-z]|-?\\frac\{\d\}\{\d\}|\d/\d)\s*\}|\d{1,2}(?![\d.])|[a-z])(?!\s*\^)")
_ENDLESS = re.compile(r"!|\d{30}|\\(?:sum|prod|int|lim|binom)")
MAX_POWER = 10_000
"""Of the exponents of a formula, multiplied."""


def grade(
    response: str,
    *,
    answer: str,
    tolerance: float = GeometryConfig.tolerance,
    format_score: float = GeometryConfig.format_score,
) -> Verdict:
    """Is what stands in the response's last \\boxed{} the `answer`?

    Score 1: "right". `format_score`: a box that is not empty, but "wrong", or "not worked out". 0: "no answer", "unfinished
    thinking". Numbers may have any usual form, and up to `tolerance` of relative error if one of them is not a whole number or a
    fraction; a decimal number may also be the answer rounded, to enough digits (`quantities.same`). Units are converted where
    both state one; where the answer has none, as in Geometry3k, any unit will do. Several candidates are wrong.

    In "a = b \\approx c" names do not count, and the first number that is worked out decides. The others must agree with the
    first (`quantities.agrees`). "not worked out": none of them is, as in 180-60-50, though the answer is; whatever its value. An
    unreduced fraction such as 6/2 is worked out. Errors: MemoryError.
    """
    _, text = split_thinking(response)
    if text is None:
        return Verdict(0.0, 0.0, "unfinished thinking")
    box = last_box(text)
    if box is None or not box.strip():
        return Verdict(0.0, 0.0, "no answer")
    reason = _compared(box, answer, tolerance)
    return Verdict(1.0, 1.0, reason) if reason == "right" else Verdict(format_score, 0.0, reason)


def last_box(text: str) -> str | None:
    """What stands in the last box that is in no other: a box within a box is only seen through if nothing is beside it."""
    found, start = None, 0
    while opening := _BOX.search(text, start):
        depth, end = 1, opening.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth:  # it stays open
            return math_data.last_boxed(text)
        found, start = text[opening.end() : end - 1], end
    while found is not None and (inner := _BOX.match(found.strip())) and found.strip().endswith("}"):
        found = found.strip()[inner.end() : -1]
    return found


def _compared(text: str, answer: str, tolerance: float) -> str:
    """ "right", "wrong", "not worked out"."""
    gold = quantities.read(answer)
    if not gold:
        return "right" if _equivalent(text, answer) else "wrong"
    found = quantities.read(text)
    worked = [q for q in found if q.worked or not gold[0].worked]
    if found and not worked:
        return "not worked out"
    agreed = all(quantities.agrees(q, found[0], tolerance) for q in found[1:])
    return "right" if worked and agreed and quantities.same(worked[0], gold[0], tolerance) else "wrong"


def _equivalent(text: str, answer: str) -> bool:
    """Of an answer that is no number."""
    text, answer = quantities.normal(text), quantities.normal(answer)
    if text == answer or not text or not _harmless(text) or (_LISTED.search(text) and not _LISTED.search(answer)):
        return text == answer != ""
    return mathematics.grade(f"\\boxed{{{text}}}", answer=math_data.delimited(answer)).correct == 1


def _harmless(text: str) -> bool:
    """Free of what keeps math-verify busy for long: towers of powers, huge numbers, sums, factorials, deep brackets."""
    powers = _POWER.findall(text)
    size = math.prod(max(int(n), 1) for power in powers for n in re.findall(r"\d+", power))
    deep = max(accumulate((c in "({[") - (c in ")}]") for c in text), default=0) > quantities.MAX_DEPTH
    return len(powers) == text.count("^") and size <= MAX_POWER and not deep and not _ENDLESS.search(text)


def prompt_text(problem: Problem) -> str:
    """The problem with its `<image>` marks, then the instruction on a line of its own if there is one."""
    return mathematics.prompt_text(problem)


def problem_id(problem: Problem) -> str:
    """Of text, answer and the pictures' content: data sets repeat texts."""
    parts = [problem["problem"], problem["answer"], *map(geometry_data.digest, problem["images"])]
    return "geometry-" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def answer_fields(problem: Problem) -> dict[str, Any]:
    """`tolerance` and `format_score` are those of the problem's config, if it came from one."""
    return {"answer": problem["answer"]} | {k: problem[k] for k in ("tolerance", "format_score") if k in problem}


def pictures(problem: Problem) -> list[Any]:
    """One entry an image: the bytes of an encoded file, the path of one, or, for a generated problem, a drawn PIL image."""
    return [geometry_data.source(image) for image in problem["images"]]


def picture_sizes(problem: Problem) -> list[tuple[int, int]] | None:
    """(width, height) of each image where that is known without making it: of a drawn one. None: of files."""
    if not all("draw" in image for image in problem["images"]):
        return None
    return [(image["draw"]["size"], image["draw"]["size"]) for image in problem["images"]]


def load(config: TaskConfig) -> Split:
    """Training and held-out problems that share none: from files or a `datasets` id, else drawn.

    Errors: UserError for a setting out of range, a file or data set that cannot be read, lacks columns or images.
    """
    c = config.geometry
    for name, test, expected in (
        ("tolerance", 0 <= c.tolerance < 1, "lie in [0, 1)"),
        ("format_score", 0 <= c.format_score < 1, "lie in [0, 1)"),
        ("eval_problems", c.eval_problems >= 1, "be at least 1"),
        ("seed", c.seed >= 0, "be at least 0"),
    ):
        if not test:
            raise UserError(f"geometry.{name} must {expected}, got {getattr(c, name)}")
    train, held_out = geometry_data.read(config, problem_id) or figures.generate(c)
    return [p | _shared(c) for p in train], [p | _shared(c) for p in held_out]


def load_all(config: TaskConfig) -> list[dict[str, Any]]:
    """All problems of `train_file` or the data set, undivided: an evaluation's. Errors: as `load`."""
    return [p | _shared(config.geometry) for p in geometry_data.read_all(config, problem_id)]


def _shared(c: GeometryConfig) -> dict[str, Any]:
    """What is the same for every problem of a config."""
    return {"instruction": c.instruction, "tolerance": c.tolerance, "format_score": c.format_score}


def teacher_answer(problem: Problem, rng: np.random.Generator, *, right: float) -> str:
    """With probability `right` the answer, boxed, else a number near it (of another kind of answer: that plus a number).

    A generated problem is worked out before that; a wrong answer comes from a slip in one step.
    """
    if "work" not in problem:
        return mathematics.teacher_answer(problem, rng, right=right)
    slip = 0
    if rng.random() >= right:
        slip = int(rng.integers(1, mathematics.SLIP + 1)) * (1 if rng.random() < 0.5 else -1)
    lines, value = figures.worked(problem["work"], slip=slip, at=int(rng.integers(len(problem["work"]))))
    return f"{lines}\n\\boxed{{{value}}}"
