"""A run directory, read whatever its state: still growing, cut short, of an older format, with torn lines or files missing.

What cannot be read is left out and named in `Run.missing`. RUN/config.yaml metrics.jsonl sessions.jsonl summary.json samples/
replays/ evaluations/ are read; none of them must be there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from etils import epath

from popo_jax.health import finite
from popo_jax.types import UserError

SLICE = "slice/"
"""Begins the names of columns that the config carries from the data to samples and evaluations."""
_TEXTS = ("prompt", "text", "images")
_TYPES: Mapping[str, pa.DataType] = {
    **dict.fromkeys(("group_id", "row", "prompt_tokens", "response_tokens", "slot", "age", "sample"), pa.int64()),
    **dict.fromkeys(("score", "correct", "advantage"), pa.float64()),
    "ended": pa.bool_(),
}
"""Of columns; others are text."""
MOST_STEPS = 2**40
"""A row of a larger step is none of a run's."""
SAMPLES = (
    *("group_id", "row", "task", "prompt_id", "score", "correct", "reason", "advantage", "prompt_tokens", "response_tokens"),
    *("ended", "signal"),
)
REPLAYS = ("slot", "group_id", "age")
EVALUATIONS = ("task", "prompt_id", "sample", "score", "correct", "reason", "response_tokens", "ended")


@dataclass(frozen=True, eq=False)
class Metrics:
    """The rows of metrics.jsonl, by step."""

    rows: tuple[Mapping[str, Any], ...]

    @cached_property
    def step(self) -> np.ndarray:
        """int [n]."""
        return np.array([r["step"] for r in self.rows], int)

    def __getitem__(self, key: str) -> np.ndarray:
        """float [n], NaN where a row lacks it."""
        return np.array([_number(r.get(key)) for r in self.rows], float)

    def has(self, key: str) -> bool:
        return bool(np.isfinite(self[key]).any())

    @property
    def names(self) -> list[str]:
        """Of all metrics that any row has."""
        return sorted({k for r in self.rows for k in r})

    def last(self, key: str) -> float:
        """Its last finite value, else NaN."""
        x = self[key]
        x = x[np.isfinite(x)]
        return float(x[-1]) if len(x) else float("nan")


@dataclass(frozen=True, eq=False)
class Run:
    path: epath.Path
    config: Mapping[str, Any]
    """Nested, as in config.yaml; empty if that cannot be read."""
    metrics: Metrics
    samples: pa.Table
    """A row for every graded response: `step`, SAMPLES, slice/*, `text_hash` (int64), `text_chars`; no texts."""
    replays: pa.Table
    """`step`, REPLAYS."""
    evaluations: pa.Table
    """A row for every answer to a held-out problem: `step`, EVALUATIONS, slice/*, `text_hash`, `text_chars`."""
    sessions: tuple[Mapping[str, Any], ...]
    """A row for each start of the trainer: versions, hardware, when, from which step."""
    summary: Mapping[str, Any]
    missing: tuple[str, ...]
    """Sentences."""

    @property
    def name(self) -> str:
        return self.path.resolve().name if "://" not in str(self.path) else self.path.name

    @property
    def task_configs(self) -> tuple[Mapping[str, Any], ...]:
        """The sections of `tasks` that have a name."""
        found = self.setting("tasks", ())
        found = found if isinstance(found, (list, tuple)) else ()
        return tuple(t for t in found if isinstance(t, Mapping) and isinstance(t.get("name"), str))

    @property
    def fingerprints(self) -> Mapping[str, Any]:
        found = self.config.get("fingerprints")
        return found if isinstance(found, Mapping) else {}

    def number(self, key: str) -> float | None:
        """A setting that is a number; None for anything else."""
        return finite(self.setting(key))

    def setting(self, key: str, default: Any = None) -> Any:
        """Of the config, by its dotted name, e.g. "algorithm.name"."""
        at: Any = self.config
        for part in key.split("."):
            at = at.get(part) if isinstance(at, Mapping) else None
        return default if at is None else at

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(t["name"] for t in self.task_configs)

    @property
    def slices(self) -> tuple[str, ...]:
        """Names of columns to slice by: `task` where there are several, then slice/*."""
        tables = (self.samples, self.evaluations)
        found = sorted({c for t in tables for c in t.column_names if c.startswith(SLICE)})
        several = len(set(self.samples["task"].unique().to_pylist()) - {None}) > 1
        return (*(("task",) if several else ()), *found)

    def texts(self, folder: str, step: int) -> pa.Table | None:
        """One file of samples/ or evaluations/ with all its columns, texts too; None if it cannot be read."""
        return _table(self.path / folder / f"{step:06d}.parquet")


def read(path: epath.PathLike) -> Run:
    """Errors: UserError if `path` is no run directory: has neither config.yaml nor metrics.jsonl."""
    path = epath.Path(path)
    missing: list[str] = []
    if not any((path / name).exists() for name in ("config.yaml", "metrics.jsonl")):
        got = "another folder" if path.exists() else "none"
        raise UserError(f"{path} must be a run directory (with config.yaml or metrics.jsonl), got {got}")
    config = _config(path, missing)
    metrics = Metrics(tuple(_rows(path / "metrics.jsonl", missing)))
    samples = _files(path / "samples", SAMPLES, missing)
    replays = _files(path / "replays", REPLAYS, missing)
    evaluations = _files(path / "evaluations", EVALUATIONS, missing)
    sessions = tuple(_session(row) for row in _lines(path / "sessions.jsonl", missing))
    _compare(metrics, samples, missing)
    return Run(path, config, metrics, samples, replays, evaluations, sessions, _summary(path, missing), tuple(missing))


def _number(x: Any) -> float:
    return float("nan") if (found := finite(x)) is None else found


def _session(row: Mapping[str, Any]) -> dict[str, Any]:
    """With parts of the kinds that they are written with; others are left out."""
    kinds = {"devices": dict, "packages": dict, "command": list, "step": int}
    return {k: v for k, v in row.items() if k not in kinds or isinstance(v, kinds[k])}


def _config(path: epath.Path, missing: list[str]) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load((path / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError) as e:
        missing.append(f"config.yaml cannot be read ({type(e).__name__}): settings and provenance are not shown.")
        return {}
    if not isinstance(found, Mapping):
        missing.append(
            f"config.yaml must be settings by name, got {type(found).__name__}: settings and provenance are not shown."
        )
        return {}
    return found


def _summary(path: epath.Path, missing: list[str]) -> Mapping[str, Any]:
    try:
        found = json.loads((path / "summary.json").read_text())
        return found if isinstance(found, Mapping) else {}
    except (OSError, ValueError):
        missing.append("summary.json is not there: the run is still going, or was cut short.")
        return {}


def _lines(path: epath.Path, missing: list[str]) -> list[dict[str, Any]]:
    """Whole JSON objects of a file, a line each."""
    try:
        lines = path.read_bytes().decode(errors="replace").split("\n")
    except OSError:
        missing.append(f"{path.name} is not there.")
        return []
    found, torn = [], []
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            found.append(row)
        else:
            torn.append(n)
    if torn:
        shown = ", ".join(map(str, torn[:5])) + (f" and {len(torn) - 5} more" if len(torn) > 5 else "")
        missing.append(f"{path.name}: line {shown} cannot be read and is left out.")
    return found


def _rows(path: epath.Path, missing: list[str]) -> list[dict[str, Any]]:
    """By step; of a step that occurs twice the last."""
    rows = _lines(path, missing)
    good = {r["step"]: r for r in rows if finite(s := r.get("step")) is not None and isinstance(s, int) and 0 <= s < MOST_STEPS}
    if len(good) < len(rows):
        missing.append(f"{path.name}: {len(rows) - len(good)} rows without a step of their own are left out.")
    return [good[s] for s in sorted(good)]


def _table(file: epath.Path) -> pa.Table | None:
    try:
        return pq.read_table(pa.BufferReader(file.read_bytes()))
    except (OSError, pa.ArrowException, ValueError):
        return None


def _files(folder: epath.Path, columns: Sequence[str], missing: list[str]) -> pa.Table:
    """All files of a folder, a step each, texts replaced by their hash and length; columns that a file lacks are null."""
    try:
        files = sorted(f for f in folder.iterdir() if f.suffix == ".parquet" and f.stem.isdigit())
    except OSError:
        files = []
    if not files:
        missing.append(f"{folder.name}/ has no files: what it would show is left out.")
    parts, bad, lacking = [], [], set()
    for file in files:
        table = _table(file)
        if table is None:
            bad.append(file.name)
            continue
        lacking |= set(columns) - set(table.column_names)
        parts.append(_light(table, columns, int(file.stem)))
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        missing.append(f"{folder.name}/: {shown} cannot be read and is left out.")
    if lacking:
        missing.append(f"{folder.name}/ lacks {', '.join(sorted(lacking))}: written by an older version.")
    empty = _light(pa.table({}), columns, 0).slice(0, 0)
    return pa.concat_tables([empty, *parts], promote_options="default").combine_chunks()


def _light(table: pa.Table, columns: Sequence[str], step: int) -> pa.Table:
    n, out = table.num_rows, {}
    out["step"] = pa.array(np.full(n, step, np.int64))
    for name in (*columns, *(c for c in table.column_names if c.startswith(SLICE))):
        kind = _TYPES.get(name, pa.string())
        out[name] = _cast(table[name], kind) if name in table.column_names else pa.nulls(n, kind)
    if "text" in table.column_names:
        texts = [t if isinstance(t, str) else "" for t in table["text"].to_pylist()]
        out["text_hash"] = pa.array([text_hash(t) for t in texts], pa.int64())
        out["text_chars"] = pa.array([len(t) for t in texts], pa.int64())
    elif "score" in columns:
        out |= {"text_hash": pa.nulls(n, pa.int64()), "text_chars": pa.nulls(n, pa.int64())}
    return pa.table(out)


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    try:
        return column.cast(kind).combine_chunks()
    except pa.ArrowException:
        return pa.nulls(len(column), kind)


def text_hash(text: str) -> int:
    """Equal for equal answers; surrounding space does not count."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(errors="replace"), digest_size=8).digest(), "little", signed=True)


def _compare(metrics: Metrics, samples: pa.Table, missing: list[str]) -> None:
    """Steps of the metrics without samples, and the other way round."""
    if not len(metrics.rows):
        missing.append("metrics.jsonl holds no row: no step was finished.")
        return
    steps, written = set(metrics.step.tolist()) - {0}, set(samples["step"].unique().to_pylist())
    lacking = int(metrics.step[-1] - metrics.step[0]) + 1 - len(metrics.step)
    if lacking:
        first = int(metrics.step[np.flatnonzero(np.diff(metrics.step) > 1)[0]]) + 1
        missing.append(f"metrics.jsonl lacks {lacking} steps, the first is {first}.")
    if written and steps - written:
        missing.append(f"samples/ lacks {len(steps - written)} of {len(steps)} steps, the first is {min(steps - written)}.")
    if written - steps:
        missing.append(
            f"samples/ has steps that metrics.jsonl lacks: {len(written - steps)}, the first is {min(written - steps)}."
        )
