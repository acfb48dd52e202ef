"""What `popo eval` is asked. Imports nothing heavy: the command line builds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from popo_jax.types import UserError

CHAT = ("template", "system", "thinking", "prefix")
"""Options that are a config's `chat`."""


@dataclass(frozen=True)
class EvalArgs:
    """avg@k and pass@k, with intervals, of a run, a checkpoint, or a file of answers; every answer is kept."""

    model: tyro.conf.Positional[str | None] = None
    """A run directory, a folder in Hugging Face's format, or a hub id."""
    task: tuple[str, ...] = ()
    """countdown, arithmetic, math, geometry, or of AIME24, AIME25, AMC23, MATH500, Minerva, OlympiadBench. None: the run's."""
    data: Path | None = None
    """JSONL or parquet of problems, in place of the task's own."""
    problem_column: str | None = None
    """In the data; None: found by its name."""
    answer_column: str | None = None
    answers: Path | None = None
    """JSONL or parquet of answers, instead of a model: columns problem and correct, or problem, text and answer."""
    k: tuple[int, ...] = ()
    """The largest is the number of samples; pass@k for 1, 2, 4, ... up to it, and these. None: 16."""
    temperature: float = 0.6
    top_p: float = 0.95
    greedy: bool | None = None
    """One greedy answer a problem besides. None: on the run's own tasks."""
    max_prompt_tokens: int | None = None
    """None: the run's; 2048 for a checkpoint."""
    max_response_tokens: int | None = None
    """None: the run's; 8192 for a checkpoint."""
    problems: int | None = None
    """None: on a run's tasks as many as in training's evaluation, else all."""
    rows: int | None = None
    """Answers sampled at once, graded and written together. None: as in training; 256 for a checkpoint."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """A checkpoint's weights and computation. None: bfloat16 on an accelerator, float32 on a CPU."""
    template: bool | None = None
    """A checkpoint's prompts in its chat template; None: where it has one."""
    system: str | None = None
    """A system message."""
    thinking: bool | None = None
    """enable_thinking of the template (Qwen3)."""
    prefix: str = ""
    """What every answer is begun with."""
    step: int | None = None
    """Of a run. None: the newest checkpoint."""
    seed: int = 0
    out: Path | None = None
    """A folder: new, or one that the same evaluation was cut short in. None: RUN/eval/..., or eval-..."""

    @property
    def samples(self) -> int:
        """Answers to a problem."""
        return max(self.k, default=16)

    @property
    def of_checkpoint(self) -> dict[str, Any]:
        """Options given that only a checkpoint has: a run has its own."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return {n: v for n in ("dtype", *CHAT) if (v := getattr(self, n)) != defaults[n]}

    def check(self) -> None:
        """Errors: UserError for the first option out of its range, or that does not go with another."""
        for sentence in self._broken():
            raise UserError(sentence)

    def _broken(self) -> Iterator[str]:
        if self.k and min(self.k) < 1:
            yield f"--k must list whole numbers of at least 1, got {list(self.k)}"
        if (self.model is None) == (self.answers is None):
            got = "neither" if self.model is None else f"{self.model} and {self.answers}"
            yield f"popo eval: expected a run, a checkpoint or a hub id, or else --answers FILE, got {got}"
        if self.answers is not None:
            read = ("answers", "k", "out")
            for f in dataclasses.fields(self):
                if f.name not in read and getattr(self, f.name) != f.default:
                    yield f"popo eval --answers: --{f.name.replace('_', '-')} is not read, nothing is sampled"
        if self.template is False and (self.system is not None or self.thinking is not None):
            yield "--system and --thinking go with a chat template, got --template False"
        for name in ("problems", "rows", "max_prompt_tokens", "max_response_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"--{name.replace('_', '-')} must be at least 1, got {value}"
        if not 0 < self.temperature < float("inf"):
            yield f"--temperature must be above 0 (--greedy True asks for greedy answers besides), got {self.temperature}"
        if not 0 < self.top_p <= 1:
            yield f"--top-p must lie in (0, 1], got {self.top_p}"
        if not 0 <= self.seed < 2**32:
            yield f"--seed must lie between 0 and 2^32 - 1, got {self.seed}"
        if self.data is not None and len(self.task) > 1:
            yield f"--data goes with one --task, got {', '.join(self.task)}"
