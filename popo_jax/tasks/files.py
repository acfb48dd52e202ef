"""Problem files: rows from JSONL or parquet with their numbers, and the split into training and held-out problems."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from etils import epath

from popo_jax.task_config import TaskConfig
from popo_jax.types import UserError

Row = dict[str, Any]
Split = tuple[list[Row], list[Row]]
"""Training and held-out problems."""


def read_rows(path: epath.PathLike, columns: Sequence[str]) -> list[tuple[int, Row]]:
    """(number from 1, row) for every row of a .jsonl or .parquet file; blank lines of JSONL are counted and left out.

    Rows have at least `columns`. Errors: UserError naming the file, and the line or row: missing, unreadable, empty, a bad row.
    """
    path = epath.Path(path)
    if path.suffix not in _READERS:
        raise UserError(f"{path} must end in {' or '.join(_READERS)}, got {path.suffix or 'no suffix'!r}")
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or type(e).__name__}") from e
    rows = _READERS[path.suffix](path, data)
    if not rows:
        raise UserError(f"{path} must hold at least one problem, found none")
    for number, row in rows:
        for name in columns:
            if name not in row:
                raise UserError(f"{place(path, number)}: column {name} is missing, found {shown(list(row))}")
    return rows


def place(path: epath.PathLike, number: int) -> str:
    """Where an error is: "FILE, line 3" or "FILE, row 3"."""
    return f"{path}, {'row' if str(path).endswith('.parquet') else 'line'} {number}"


def shown(x: object) -> str:
    """`x` short enough for an error's one sentence."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    return short.repr(x)


def need(holds: bool, what: str, expected: str, got: object) -> None:
    """Errors: UserError "WHAT must be EXPECTED, got GOT" unless it holds."""
    if not holds:
        raise UserError(f"{what} must be {expected}, got {shown(got)}")


def whole(x: object, low: int, high: int) -> bool:
    """An integer from low to high; neither a bool nor a float such as 3.0."""
    return isinstance(x, int) and not isinstance(x, bool) and low <= x <= high


def split(
    config: TaskConfig,
    generate: Callable[[frozenset[Any]], Split],
    read: Callable[[epath.PathLike], list[Row]],
    key: Callable[[Mapping[str, Any]], Hashable],
) -> Split:
    """Training and held-out problems that share no key, from the files given, the rest from `generate(keys to avoid)`.

    Errors: UserError if two files share keys.
    """
    train = read(config.train_file) if config.train_file is not None else None
    held_out = read(config.eval_file) if config.eval_file is not None else None
    taken = frozenset(key(p) for p in train or held_out or ())
    if train is not None and held_out is not None:
        shared = sum(key(p) in taken for p in held_out)
        if shared:
            raise UserError(
                f"{config.eval_file} must hold no problem of {config.train_file}, got {shared} of {len(held_out)} in both "
                "(order of the numbers aside)"
            )
        return train, held_out
    new_train, new_held_out = generate(taken)
    return (new_train if train is None else train), (new_held_out if held_out is None else held_out)


def _jsonl(path: epath.Path, data: bytes) -> list[tuple[int, Row]]:
    rows = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as e:  # ValueError: not UTF-8, not JSON, a number of 10^4 digits
            raise UserError(f"{place(path, number)}: must be a JSON object, got {shown(line.decode(errors='replace'))}") from e
        if not isinstance(row, dict):
            raise UserError(f"{place(path, number)}: must be a JSON object, got {shown(row)}")
        rows.append((number, row))
    return rows


def _parquet(path: epath.Path, data: bytes) -> list[tuple[int, Row]]:
    import pyarrow as pa  # slow to import, and most runs read none
    import pyarrow.parquet as pq

    try:
        return list(enumerate(pq.read_table(pa.BufferReader(data)).to_pylist(), 1))
    except (pa.ArrowException, OSError, ValueError) as e:
        raise UserError(f"{path} must be a parquet file: {str(e).splitlines()[0]}") from e


_READERS: Mapping[str, Callable[[epath.Path, bytes], list[tuple[int, Row]]]] = {".jsonl": _jsonl, ".parquet": _parquet}
