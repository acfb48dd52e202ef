"""Each limit that the config sets, and how often it held something back."""

from __future__ import annotations

from typing import Any

import numpy as np

from popo_jax.report.frame import Table
from popo_jax.report.read import Run
from popo_jax.report.slices import coded

WITHOUT_REPLAY = ("grpo", "grpo-filter", "dapo")
Row = tuple[str, Any, float | None, str]
"""Setting, value, how often it fired (None: not known), of what."""


def settings(run: Run) -> Table:
    rows = [*_clips(run), *(_replay(run) if run.setting("algorithm.name") not in WITHOUT_REPLAY else []), *_steps(run)]
    shown = tuple((key, "off" if value is None else value, fired, what) for key, value, fired, what in rows)
    note = 'Fired: a share of what the last column names, unless that begins with "count". Empty: not measured in this run.'
    return Table("safeguards/settings", "Limits, and how often they fired", ("setting", "value", "fired", "of what"), shown, note)


def _mean(run: Run, key: str) -> float | None:
    x = run.metrics[key]
    return float(x[np.isfinite(x)].mean()) if run.metrics.has(key) else None


def _total(run: Run, key: str) -> float | None:
    x = run.metrics[key]
    return float(x[np.isfinite(x)].sum()) if run.metrics.has(key) else None


def _share(x: np.ndarray, hit: np.ndarray) -> float | None:
    """Of the finite x."""
    known = np.isfinite(x)
    return float(hit[known].mean()) if known.any() else None


def _clips(run: Run) -> list[Row]:
    rows: list[Row] = []
    for side in ("low", "high"):
        for kind in ("fresh", "replayed"):
            fired = _mean(run, f"clip/{side}_{kind}")
            if kind == "fresh" or fired is not None:
                rows.append((f"loss.clip_{side}", run.setting(f"loss.clip_{side}"), fired, f"{kind} tokens, mean over steps"))
    rows.append(("loss.dual_clip", run.setting("loss.dual_clip"), None, "tokens of negative advantage"))
    return rows


def _replay(run: Run) -> list[Row]:
    """Weights and the buffer's limits."""
    age, (group, groups) = run.replays["age"].to_numpy().astype(float), coded(run.replays["group_id"])
    at = {k: run.number(f"replay.{k}") for k in ("min_age", "max_age", "max_uses", "capacity")}
    known = np.isfinite(age)
    ages = {k: float((age[known] == at[k]).mean()) if known.any() and at[k] is not None else None for k in ("min_age", "max_age")}
    uses = np.bincount(group[group >= 0], minlength=len(groups))
    spent = float((uses >= at["max_uses"]).sum()) if at["max_uses"] is not None and len(run.replays) else None
    size = run.metrics["replay/size"]
    full = _share(size, size >= at["capacity"]) if at["capacity"] is not None else None
    return [
        ("weight.cap", run.setting("weight.cap"), _mean(run, "weight/capped"), "replayed tokens, mean over steps"),
        ("replay.min_age", at["min_age"], ages["min_age"], "replays, of groups just old enough"),
        ("replay.max_age", at["max_age"], ages["max_age"], "replays, of groups about to be too old"),
        ("replay.max_uses", at["max_uses"], spent, "count of groups replayed that often"),
        ("replay.capacity", at["capacity"], full, "steps that end with a full buffer"),
    ]


def _steps(run: Run) -> list[Row]:
    norm, limit = run.metrics["grad_norm"], run.setting("optim.grad_clip")
    clipped = _share(norm, norm > limit) if isinstance(limit, (int, float)) else None
    reason, reasons = coded(run.samples["reason"])
    failed = {k: float((reason == reasons.index(k)).sum()) if k in reasons else 0.0 for k in ("timeout", "memory")}
    seen = failed if len(run.samples) else dict.fromkeys(failed)
    cut = _mean(run, "response/truncated")
    return [
        ("sample.max_response_tokens", run.setting("sample.max_response_tokens"), cut, "responses, mean over steps"),
        ("optim.grad_clip", limit, clipped, "steps with a larger gradient norm"),
        (
            "batch.mini_batches",
            run.setting("batch.mini_batches"),
            _total(run, "update/skipped"),
            "count of updates without a token",
        ),
        ("updates that are finite", "always", _total(run, "update/nonfinite"), "count of updates left out"),
        ("verifier.seconds", run.setting("verifier.seconds"), seen["timeout"], "count of verdicts at the limit of time"),
        ("verifier.memory_gb", run.setting("verifier.memory_gb"), seen["memory"], "count of verdicts at the limit of memory"),
        (
            "algorithm.dead_steps",
            run.setting("algorithm.dead_steps"),
            _dead(run),
            "count of steps in a row without an effective group",
        ),
    ]


def _dead(run: Run) -> float | None:
    """The longest stretch."""
    x = run.metrics["groups/effective"]
    if not np.isfinite(x).any():
        return None
    longest = current = 0
    for value in x[np.isfinite(x)]:
        current = current + 1 if value == 0 else 0
        longest = max(longest, current)
    return float(longest)
