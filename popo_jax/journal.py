"""What a step leaves behind: its row in metrics.jsonl, its graded responses, what was replayed, a line on the console."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from etils import epath

from popo_jax.evaluate import Answers
from popo_jax.health import Watch
from popo_jax.rl.rollout import Rollout, overall
from popo_jax.run_dir import Progress, RunDir
from popo_jax.runtime.console import Console
from popo_jax.runtime.machine import Meter
from popo_jax.runtime.writers import Loggers
from popo_jax.types import FillPlan, Group, Prompt


@dataclass(frozen=True, eq=False)
class Journal:
    """Of several processes the first one's writes; all hold the same."""

    run: RunDir
    loggers: Loggers
    console: Console
    writes: bool = True
    pictures: Callable[[Sequence[Prompt], epath.Path], list[list[str]]] | None = None
    """(prompts, folder) -> files in which the images of each can be looked at, written into the folder if they are none."""
    watch: Watch = field(default_factory=Watch)
    """Has seen the rows that are there."""
    meter: Meter = field(default_factory=lambda: Meter({}))

    def row(self, row: dict[str, float]) -> None:
        if not self.writes:
            return
        self.run.metrics.append(row)
        self.loggers.log(int(row["step"]), row)
        self.console.row(row)
        for crossing in self.watch.see(row):
            self.console.warn(int(row["step"]), crossing.sentence, crossing.rule.advice)

    def evaluation(self, step: int, found: Answers) -> None:
        """Every answer to a held-out problem after `step` updates."""
        if self.writes:
            self.run.evaluations.write(step, evaluated(found))

    def step(self, progress: Progress, rollout: Rollout, plan: FillPlan, measured: dict[str, float], seconds: float) -> None:
        """Row n speaks of the state after n updates; samples and replays of step n are what update n was made from."""
        if not self.writes:
            return
        n = progress.step
        self.run.samples.write(n, samples(rollout) | self._images(rollout))
        self.run.replays.write(n, replays(plan))
        totals = {"rollouts_total": progress.rollouts_total, "tokens_generated_total": progress.tokens_generated_total}
        self.row({"step": n} | totals | overall(rollout.groups) | measured | self.meter.take() | {"time/step": seconds})

    def _images(self, rollout: Rollout) -> dict[str, list]:
        """Column `images` of the samples, where the policy sees: files, or names in the run directory."""
        if self.pictures is None:
            return {}
        files = self.pictures(rollout.prompts, self.run.path / "images")
        return {"images": [f for f, g in zip(files, rollout.groups, strict=True) for _ in g.lengths]}


def samples(rollout: Rollout) -> dict[str, list]:
    """Columns of samples/NNNNNN.parquet: every graded response of a step."""
    columns: dict[str, list] = {name: [] for name in _SAMPLE_COLUMNS}
    for group, prompt in zip(rollout.groups, rollout.prompts, strict=True):
        for row in range(len(group.lengths)):
            values = (group.id, row, prompt.task, prompt.id, prompt.text, *_graded(group, row), group.signal)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    of = [p for g, p in zip(rollout.groups, rollout.prompts, strict=True) for _ in g.lengths]
    return columns | slices(of)


def slices(prompts: Sequence[Prompt]) -> dict[str, list]:
    """Columns slice/NAME of rows that answer these prompts; None where a prompt's task names no such column."""
    names = sorted({name for p in prompts for name in p.slices})
    return {f"slice/{name}": [p.slices.get(name) for p in prompts] for name in names}


def evaluated(a: Answers) -> dict[str, list]:
    """Columns of evaluations/NNNNNN.parquet: every answer to a held-out problem, `sample` its number among the problem's."""
    k = a.correct.shape[1]
    of = [a.prompts[i // k] for i in range(len(a.texts))]
    columns: dict[str, list] = {
        "task": [p.task for p in of],
        "prompt_id": [p.id for p in of],
        "prompt": [p.text for p in of],
        "sample": [i % k for i in range(len(of))],
        "text": list(a.texts),
        "score": [float(v.score) for v in a.verdicts],
        "correct": a.correct.ravel().astype(float).tolist(),
        "reason": [v.reason for v in a.verdicts],
        "response_tokens": a.lengths.tolist(),
        "ended": a.ended.tolist(),
    }
    return columns | slices(of)


_SAMPLE_COLUMNS = (
    *("group_id", "row", "task", "prompt_id", "prompt", "text", "score", "correct", "reason", "advantage"),
    *("prompt_tokens", "response_tokens", "ended", "signal"),
)


def _graded(g: Group, row: int) -> tuple:
    first = int(g.lengths[:row].sum())
    response = int(g.sampled_mask[first : first + int(g.lengths[row])].sum())
    verdict = (g.texts[row], float(g.score[row]), float(g.correct[row]), g.reasons[row], float(g.adv[row]))
    return (*verdict, int(g.lengths[row]) - response, response, bool(g.ended[row]))


def replays(plan: FillPlan) -> dict[str, list]:
    """Columns of replays/NNNNNN.parquet: slot, group_id, age of what was replayed."""
    slots = plan.replaced.nonzero()[0]
    return {"slot": slots.tolist(), "group_id": plan.source[slots].tolist(), "age": plan.age[slots].tolist()}
