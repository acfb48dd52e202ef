"""Mathematics suites by name: where each lies on the Hugging Face hub, and which column is what. All of a suite is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from popo_jax import plain
from popo_jax.task_config import TASK_NAMES, MathConfig, TaskConfig
from popo_jax.types import UserError


@dataclass(frozen=True)
class Suite:
    name: str
    dataset: str
    """Its id on the hub."""
    split: str
    problem: str
    """Column of the problem."""
    answer: str
    """Column of the final answer."""
    subset: str | None = None
    """The data set's configuration."""


SUITES: Mapping[str, Suite] = {
    s.name.lower(): s
    for s in (
        Suite("AIME24", "HuggingFaceH4/aime_2024", "train", "problem", "answer"),
        Suite("AIME25", "math-ai/aime25", "test", "problem", "answer"),
        Suite("AMC23", "math-ai/amc23", "test", "question", "answer"),
        Suite("MATH500", "HuggingFaceH4/MATH-500", "test", "problem", "answer"),
        Suite("Minerva", "math-ai/minervamath", "test", "question", "answer"),
        Suite("OlympiadBench", "Hothan/OlympiadBench", "train", "question", "final_answer", "OE_TO_maths_en_COMP"),
    )
}
"""The last: open-ended problems of competitions, text only, in English."""


def find(name: str) -> Suite | None:
    """The suite of that name, in capitals or not; None if it is one of our tasks. Errors: UserError for any other name."""
    known = {key: s.name for key, s in SUITES.items()} | {t: t for t in TASK_NAMES}
    if name.lower() not in known:
        raise UserError(f"--task must be one of {', '.join(known.values())}, got {name!r}{plain.nearest(name.lower(), known)}")
    return SUITES.get(name.lower())


def config(base: TaskConfig, suite: Suite | None, data: str | None, *, problem: str | None, answer: str | None) -> TaskConfig:
    """A mathematics task whose `train_file` or data set holds a suite's problems: on the hub, or in the file `data`.

    Columns not named are the suite's on the hub, and found by their names in a file. The instruction is that of `base`, and
    so is the verifier, but for suites.
    """
    m = MathConfig(instruction=base.math.instruction, problem_column=problem, answer_column=answer)
    if data is None and suite is not None:
        m = replace(m, dataset=suite.dataset, dataset_name=suite.subset, train_split=suite.split)
        m = replace(m, problem_column=problem or suite.problem, answer_column=answer or suite.answer)
    return TaskConfig("math", train_file=data, verifier=base.verifier if suite is None else None, math=m)
