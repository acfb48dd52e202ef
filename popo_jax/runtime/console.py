"""What a person watches: a banner, a line of the few numbers that matter, the result. Presentation only."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import rich.console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from popo_jax.config import Config

EVERY = 5.0
"""Seconds between two lines where there is no terminal; steps with an evaluation always have one."""


class Console:
    """A context manager around the loop; `say` and `banner` work outside it as well."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._out = rich.console.Console(quiet=quiet, soft_wrap=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[line]}"),
        )
        self._live: Live | None = None
        self._task: Any = None
        self._steps, self._last = 0, 0.0

    def say(self, text: str) -> None:
        self._out.print(text, markup=False)

    def banner(
        self, c: Config, parameters: int, attention: str, devices: Sequence[Any], problems: Mapping[str, tuple[int, int]]
    ) -> None:
        """What runs: algorithm, tasks with their problems (training, held out), policy size, attention, devices, batch.

        `c` is the config with its micro-batch decided, which is told.
        """
        self._steps = c.steps
        tasks = ", ".join(f"{t} ({a} problems, {b} held out)" for t, (a, b) in problems.items())
        kind = f"{len(devices)} x {devices[0].device_kind}" if len(devices) > 1 else devices[0].device_kind
        self._out.print(
            f"[bold]{c.algorithm.name}[/bold] on {tasks}; {parameters / 1e6:.2f} M parameters, {c.model.dtype}, "
            f"attention {attention}; {kind}"
        )
        b = c.batch
        self._out.print(
            f"{c.steps} steps of {b.prompts} prompts x {b.group_size} responses, "
            f"{b.micro_batch} rows trained at once, seed {c.seed}"
        )

    def __enter__(self) -> Console:
        if self._out.is_terminal:
            self._task = self._bar.add_task("steps", total=self._steps, line="")
            self._live = Live(self._bar, console=self._out, refresh_per_second=4)
            self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)
            self._live = None

    def row(self, row: Mapping[str, Any]) -> None:
        """One step: evaluations stay on the screen, the rest goes by."""
        line, now = describe(row), time.monotonic()
        if self._live is not None:
            self._bar.update(self._task, completed=row["step"], line=line)
        if "eval/accuracy" in row or (self._live is None and now - self._last >= EVERY):
            self._out.print(f"step {row['step']:>4}  {line}", markup=False)
            self._last = now

    def warn(self, step: int, sentence: str, advice: str) -> None:
        """A line of health was crossed. It stays on the screen."""
        self._out.print(f"[bold yellow]step {step:>4}  worry:[/bold yellow] {escape(sentence)}. Try: {escape(advice)}")

    def summary(self, summary: Mapping[str, Any], path: Any) -> None:
        first, last = 100 * summary["eval/accuracy/first"], 100 * summary["eval/accuracy/last_two"]
        self._out.print(
            f"[bold]held-out accuracy {first:.1f} % -> {last:.1f} %[/bold] (mean of the last two evaluations) after step "
            f"{summary['step']}, {summary['rollouts_total']} responses, {summary['seconds']:.0f} s; everything is in {path}"
        )


def describe(row: Mapping[str, Any]) -> str:
    """The few numbers that matter, in one line; what a row lacks is left out."""

    def number(key: str, text: str, scale: float = 1.0) -> str:
        value = row.get(key)
        return text.format(scale * value) if isinstance(value, (int, float)) and value == value else ""

    split = " ".join(filter(None, (number(f"time/{k}", k + " {:.2f}") for k in ("sample", "grade", "replay", "update"))))
    parts = [
        number("eval/accuracy", "held-out {:.1f} %", 100) + number("eval/blind/accuracy", " (blind {:.1f} %)", 100),
        number("accuracy/train", "train {:.1f} %", 100),
        number("groups/effective", "effective {:.0f} %", 100),
        number("replay/filled", "replayed {:.0f}") + number("replay/age_mean", " (age {:.1f})"),
        number("entropy", "entropy {:.2f}"),
        number("time/step", "{:.2f} s") + (f" ({split})" if split else ""),
    ]
    return "  ".join(filter(None, parts))
