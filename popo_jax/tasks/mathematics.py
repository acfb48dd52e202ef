"""Mathematics: a problem in words and formulas, an answer that math-verify compares with the given one.

Its parser and sympy know no bounds, so `grade` runs in the workers of a pool. What the model thinks, up to the last
</think>, is kept apart and never graded.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any

import numpy as np

from popo_jax.task_config import TaskConfig
from popo_jax.tasks import math_data, word_problems
from popo_jax.tasks.files import Split
from popo_jax.tasks.tags import split_thinking
from popo_jax.types import Verdict

SLIP = 10
"""The largest distance of a teacher's wrong answer from the right one."""

Problem = Mapping[str, Any]


def grade(
    response: str,
    *,
    answer: str,
    latex: bool = True,
    expressions: bool = True,
    boxed_priority: int = 0,
    precision: int = 6,
    strict: bool = True,
    relations: bool = False,
) -> Verdict:
    """Does math-verify find `answer` in the response? Score 1: it does ("right"). 0: "wrong", "no answer", "unfinished thinking".

    The verdict is that of `verify(parse(answer), parse(response))` with its extraction of `latex` and plain `expressions`, a
    \\boxed{} before anything else (`boxed_priority`), floats rounded to `precision` digits, and `strict` and `relations`
    (allow_set_relation_comp) handed on. Its own time limits are off: the pool's ends the work.
    Errors: MemoryError; anything else that math-verify raises means no answer, or another one, as it does there.
    """
    _, text = split_thinking(response)
    if text is None:
        return Verdict(0.0, 0.0, "unfinished thinking")
    how = (latex, expressions, boxed_priority)
    found = _parse(text, *how)
    if not found:
        return Verdict(0.0, 0.0, "no answer")
    right = _verify(_gold(answer, *how), found, float_rounding=precision, strict=strict, allow_set_relation_comp=relations)
    return Verdict(1.0, 1.0, "right") if right else Verdict(0.0, 0.0, "wrong")


def parses(answer: str) -> Verdict:
    """Correct 1 if math-verify reads something out of a given answer, as it stands in `grade`."""
    found = bool(_parse(answer, True, True, 0))
    return Verdict(float(found), float(found), "read" if found else "nothing to read")


@lru_cache(maxsize=4096)
def _gold(answer: str, *how: Any) -> list[Any]:
    """The samples of a group share it."""
    return _parse(answer, *how)


def _parse(text: str, latex: bool, expressions: bool, boxed_priority: int) -> list[Any]:
    _, parse, _ = _library()
    try:
        return parse(text, _targets(latex, expressions, boxed_priority), parsing_timeout=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:  # what parse does by itself, but for MemoryError
        return []


def _verify(gold: list[Any], found: list[Any], **options: Any) -> bool:
    _, _, verify = _library()
    return any(_same(verify, g, f, options) for g in gold for f in found)


def _same(verify: Any, gold: Any, found: Any, options: dict[str, Any]) -> bool:
    try:
        return bool(verify([gold], [found], timeout_seconds=None, raise_on_error=True, **options))
    except MemoryError:
        raise
    except Exception:
        return False


@cache
def _targets(latex: bool, expressions: bool, boxed_priority: int) -> list[Any]:
    library, _, _ = _library()
    targets = [library.LatexExtractionConfig(boxed_match_priority=boxed_priority)] if latex else []
    return targets + ([library.ExprExtractionConfig()] if expressions else [])


@cache
def _library() -> tuple[Any, Any, Any]:
    """math-verify, its parse and its verify. Half a second, which only workers spend; silenced, since it logs responses."""
    import math_verify

    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return math_verify, math_verify.parse, math_verify.verify


def prompt_text(problem: Problem) -> str:
    """The problem, then the instruction on a line of its own if there is one."""
    return problem["problem"] + ("\n" + problem["instruction"] if problem["instruction"] else "")


def problem_id(problem: Problem) -> str:
    return "math-" + hashlib.sha256(problem["problem"].encode(errors="surrogatepass")).hexdigest()[:12]


def answer_fields(problem: Problem) -> dict[str, Any]:
    return {"answer": math_data.delimited(problem["answer"])}


def load(config: TaskConfig) -> Split:
    """Training and held-out problems that share none: from files or a `datasets` id, else generated in words.

    Errors: UserError for a file or data set that cannot be read, lacks columns, or has an answer that math-verify cannot parse.
    """
    train, held_out = math_data.read(config, problem_id) or word_problems.generate(config.math)
    instruction = {"instruction": config.math.instruction}
    return [p | instruction for p in train], [p | instruction for p in held_out]


def load_all(config: TaskConfig) -> list[dict[str, Any]]:
    """All problems of `train_file` or the data set, undivided: an evaluation's. Errors: as `load`."""
    return [p | {"instruction": config.math.instruction} for p in math_data.read_all(config, problem_id)]


def teacher_answer(problem: Problem, rng: np.random.Generator, *, right: float) -> str:
    """With probability `right` the answer, boxed, else a number near it (of another kind of answer: that plus a number).

    A generated problem is worked out before that, a line for each step; a wrong answer comes from a slip in one of them.
    """
    answer, slip = problem["answer"], 0
    if rng.random() >= right:
        slip = int(rng.integers(1, SLIP + 1)) * (1 if rng.random() < 0.5 else -1)
    if "work" in problem:
        lines, value = word_problems.worked(problem["work"], slip=slip, at=int(rng.integers(len(problem["work"]) - 1)))
        return f"{lines}\n\\boxed{{{value}}}"
    if slip:
        whole = answer.removeprefix("-").isdecimal() and len(answer) < 60
        answer = str(int(answer) + slip) if whole else f"{answer} + {abs(slip)}"
    return f"\\boxed{{{answer}}}"
