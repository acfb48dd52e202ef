"""The tensors in a folder's safetensors files: found, checked to be whole, read a piece at a time.

A file is mapped anew for every piece, so that the pages read before leave memory: what is resident is one piece.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
from etils import epath

from popo_jax.models.json_files import read_json
from popo_jax.types import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PIECE = 2**24
"""Bytes of a file read at once."""


class Stored(NamedTuple):
    """One tensor of a file."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


@contextlib.contextmanager
def tensors(folder: epath.PathLike) -> Iterator[Mapping[str, Stored]]:
    """Name -> tensor, readable inside the context. Errors: UserError for no weights, a broken index, a file cut short."""
    folder = epath.Path(folder)
    names = _weight_files(folder)
    with _local(folder, names) as local:
        yield _open([local / name for name in names], folder)


def read(s: Stored, index: Sequence[slice], out: np.ndarray) -> None:
    """out[...] = tensor[index], converted to out's dtype, in pieces along the first axis."""
    first, last, _ = index[0].indices(s.shape[0])
    rows = max(PIECE // max(4 * int(np.prod(s.shape[1:], dtype=np.int64)), 1), 1)
    for a in range(first, last, rows):
        b = min(a + rows, last)
        with safetensors.safe_open(s.file, framework="np") as f:
            out[a - first : b - first] = f.get_slice(s.name)[(slice(a, b), *index[1:])]


def some(names: Sequence[str], listed: int = 4) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - listed
    return ", ".join(names[:listed]) + (f" and {rest} more" if rest > 0 else "")


def _weight_files(folder: epath.Path) -> list[str]:
    if (folder / SINGLE).exists():
        return [SINGLE]
    if not (folder / INDEX).exists():
        raise UserError(f"{folder}: no weights, expected {SINGLE} or {INDEX}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{folder / INDEX}: weight_map must map names to files, got {type(weight_map).__name__}")
    files = sorted(set(weight_map.values()))
    absent = [f for f in files if not (folder / f).exists()]
    if absent:
        raise UserError(f"{folder}: {INDEX} names {some(absent)}, which {'is' if len(absent) == 1 else 'are'} not there")
    return files


def _open(files: Sequence[Path], folder: epath.Path) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="np") as f:
                for name in f.keys():  # noqa: SIM118 (not a mapping)
                    part = f.get_slice(name)
                    found[name] = Stored(name, file, tuple(part.get_shape()), part.get_dtype())
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{folder}/{file.name}: not a whole safetensors file ({error})") from None
    return found


@contextlib.contextmanager
def _local(folder: epath.Path, names: Sequence[str]) -> Iterator[Path]:
    """The folder itself, or a copy of its weights where it lies in a bucket: safetensors reads files only."""
    if "://" not in str(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as copy:
        for name in names:
            (folder / name).copy(Path(copy) / name)
        yield Path(copy)
