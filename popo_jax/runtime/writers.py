"""Files of a run directory, and other loggers behind the same call. Everything that is written can be rewound."""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from etils import epath

from popo_jax.types import UserError


def new_run_dir(path: epath.PathLike, *, make: bool = True) -> epath.Path:
    """Make it, or only look whether it could be. Errors: UserError if something is there already."""
    if "://" in str(path):
        raise UserError(f"run directory {path} must be on a file system (of a bucket: gcsfuse), got an address")
    path = epath.Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"run directory {path} must be new or empty, got one in use; to go on with it: popo train --resume {path}"
        )
    if make:
        path.mkdir(parents=True, exist_ok=True)
    return path


class MetricsFile:
    """metrics.jsonl: one row a line, NaN and empty as null."""

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)

    def append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps({k: _plain(v) for k, v in row.items()}) + "\n"
        with _disk(self.path), self.path.open("a") as f:
            f.write(line)
            f.flush()
            os.fsync(f.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """Whole rows; a torn last line is left out."""
        return [json.loads(line) for line in self._whole()[0]]

    def rewind(self, step: int, discarded: epath.Path) -> None:
        """Rows beyond `step` and a torn last line move to discarded/metrics-NNNNNN.jsonl (numbered on)."""
        whole, torn = self._whole()
        keep = [line for line in whole if json.loads(line)["step"] <= step]
        gone = whole[len(keep) :] + torn
        if gone:
            discarded.mkdir(parents=True, exist_ok=True)
            target = unused(discarded, f"metrics-{step:06d}", ".jsonl")
            target.write_text("".join(f"{line}\n" for line in gone))
            partial = self.path.parent / f".{self.path.name}.partial"
            partial.write_text("".join(f"{line}\n" for line in keep))
            partial.replace(self.path)

    def _whole(self) -> tuple[list[str], list[str]]:
        """(lines that are whole rows, what is torn)."""
        if not self.path.exists():
            return [], []
        lines = self.path.read_text().split("\n")
        whole = lines[:-1]
        torn = [lines[-1]] if lines[-1] else []
        while whole and not _is_row(whole[-1]):
            torn.insert(0, whole.pop())
        for n, line in enumerate(whole, 1):
            if not _is_row(line):
                raise UserError(f"{self.path}, line {n} must be a JSON row with a whole number `step`, got {line[:80]!r}")
        return whole, torn


class ParquetFiles:
    """NNNNNN.parquet, one file a step, written whole or not at all."""

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder)

    def write(self, step: int, columns: Mapping[str, Sequence[Any]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        safe = {name: [_utf8(v) if isinstance(v, str) else v for v in values] for name, values in columns.items()}
        with _disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            partial, buffer = self.folder / f".{step:06d}.partial", pa.BufferOutputStream()
            pq.write_table(pa.table(safe), buffer)
            partial.write_bytes(buffer.getvalue().to_pybytes())
            partial.replace(self.folder / f"{step:06d}.parquet")

    def rewind(self, step: int, discarded: epath.Path) -> None:
        """Files of later steps move to discarded/<folder>-NNNNNN/ (numbered on)."""
        late = [p for p in sorted(self.folder.glob("*.parquet")) if int(p.stem) > step] if self.folder.exists() else []
        if late:
            target = unused(discarded, f"{self.folder.name}-{step:06d}", "")
            target.mkdir(parents=True)
            for p in late:
                p.rename(target / p.name)


class Loggers:
    """tensorboard and wandb, each if asked for. Errors: UserError naming the extra to install."""

    def __init__(self, names: Sequence[str], folder: epath.PathLike, config: Mapping[str, Any]):
        self._board, self._wandb = None, None
        if "tensorboard" in names:
            self._board = _extra("tensorboardX").SummaryWriter(str(epath.Path(folder) / "tensorboard"))
        if "wandb" in names:
            self._wandb = _extra("wandb").init(project="popo_jax", dir=str(folder), config=dict(config))

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        numbers = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        if self._board is not None:
            for k, v in numbers.items():
                self._board.add_scalar(k, v, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Write what is pending. Nothing is logged after it."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _extra(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise UserError(f"loggers: {package} must be installed for this, got none: pip install 'popo-jax[loggers]'") from e


def _plain(v: Any) -> Any:
    if isinstance(v, (float, int, str, bool)) or v is None:
        return None if isinstance(v, float) and not math.isfinite(v) else v
    return _plain(v.item())  # numpy and jax scalars


def _utf8(text: str) -> str:
    """Lone surrogates, which no file takes, spelt out."""
    return text.encode(errors="backslashreplace").decode()


def _is_row(line: str) -> bool:
    try:
        return isinstance(json.loads(line)["step"], int)
    except (ValueError, KeyError, TypeError):
        return False


def unused(folder: epath.Path, stem: str, suffix: str) -> epath.Path:
    """folder/stem+suffix, numbered on if that is taken."""
    path, n = folder / f"{stem}{suffix}", 1
    while path.exists():
        n += 1
        path = folder / f"{stem}-{n}{suffix}"
    return path


@contextmanager
def _disk(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{path}: the disk is full; what was written before is whole") from e
        raise
