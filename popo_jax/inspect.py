"""`popo inspect RUN`: what a run and its checkpoints hold."""

from __future__ import annotations

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from popo_jax import restore, run_dir
from popo_jax.run_dir import RunDir
from popo_jax.runtime.checkpoints import Checkpoints
from popo_jax.types import UserError

SHOWN = ("accuracy/train", "groups/effective", "replay/filled", "replay/size", "entropy", "loss", "time/step")


def command(path: epath.PathLike) -> None:
    """Print the run's settings that matter, its last figures, and a line per committed checkpoint."""
    run, console = run_dir.open_existing(path), Console()
    c = restore.load_config(run.path / "config.yaml")
    console.print(
        f"[bold]{run.path}[/bold]: {c.algorithm.name} on {', '.join(t.name for t in c.tasks)}, seed {c.seed}, {c.steps} steps"
    )
    console.print(f"  {c.batch.prompts} prompts x {c.batch.group_size} responses a step, rows of {c.row_tokens} tokens")
    _figures(run, console)
    with Checkpoints(run.path / "checkpoints", keep_last=c.checkpoint.keep_last, keep_best=c.checkpoint.keep_best) as checkpoints:
        if not checkpoints.steps():
            console.print("no checkpoint yet")
            return
        console.print(_table(run, checkpoints))


def _figures(run: RunDir, console: Console) -> None:
    rows = run.metrics.rows()
    if not rows:
        console.print("no metrics yet")
        return
    scores = [(r["step"], r["eval/accuracy"]) for r in rows if r.get("eval/accuracy") is not None]
    console.print("  held-out accuracy: " + ", ".join(f"{100 * s:.1f} % at {n}" for n, s in scores))
    last = rows[-1]
    shown = [f"{k} {last[k]:.4g}" for k in SHOWN if isinstance(last.get(k), (int, float))]
    console.print(f"  step {last['step']}: " + ", ".join(shown))


def _table(run: RunDir, checkpoints: Checkpoints) -> Table:
    table = Table(title="checkpoints")
    for name in ("step", "size", "prompts taken", "responses", "stored groups", "their versions", "times used", "tokenizer"):
        table.add_column(name, justify="right")
    for step in checkpoints.steps():
        folder = run.path / "checkpoints" / str(step)
        size = _bytes(folder)
        try:
            meta, replay = checkpoints.read_meta(step), checkpoints.read_replay(step)
            run_dir.check_tokenizer(meta, meta.get("fingerprints", {}).get("tokenizer"), f"checkpoint {folder}")
        except UserError as e:
            table.add_row(str(step), f"{size / 1e6:.1f} MB", str(e))
            continue
        p, versions, uses = meta["progress"], replay["version"], replay["uses"]
        span = f"{versions.min()} - {versions.max()}" if len(versions) else "-"
        row = (step, f"{size / 1e6:.1f} MB", p["position"], p["rollouts_total"], len(versions), span, int(np.sum(uses)))
        table.add_row(*map(str, row), meta["fingerprints"]["tokenizer"])
    return table


def _bytes(folder: epath.Path) -> int:
    return sum(_bytes(p) if p.is_dir() else p.stat().length for p in folder.iterdir())
