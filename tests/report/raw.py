"""Raw files of a run, read with plain loops, to recompute what the report says by other code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]


def files(run: Path, folder: str) -> dict[int, list[dict[str, Any]]]:
    """Step -> rows."""
    return {int(f.stem): pq.read_table(f).to_pylist() for f in sorted((run / folder).glob("*.parquet"))}


def having(run: Path, key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the rows that have a metric."""
    found = [(r["step"], r[key]) for r in rows(run) if r.get(key) is not None]
    return [s for s, _ in found], [v for _, v in found]


def figure(section: Any, name: str) -> Any:
    return next(f for f in section.figures if f.id == name)


def line(section: Any, name: str, label: str) -> Any:
    return next(s for s in figure(section, name).series if s.name == label)
