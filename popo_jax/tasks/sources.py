"""Problems of a file or a hub data set, and what is held out of them: shared by tasks whose problems are given."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from popo_jax.task_config import GeometryConfig, MathConfig, TaskConfig
from popo_jax.tasks import files
from popo_jax.tasks.files import Row, Split
from popo_jax.types import UserError

Table = tuple[str, Iterable[tuple[str, Row]]]
"""A source's name, and its rows, each with its place."""
Problems = Callable[[str, Iterable[tuple[str, Row]]], list[Row]]
"""From a source's table to its problems. Errors: UserError with the place."""
Prepare = Callable[[Any], Any]
"""Applied to a data set of the `datasets` library before its rows are read."""
Settings = MathConfig | GeometryConfig


def read(
    config: TaskConfig,
    c: Settings,
    problems: Problems,
    problem_id: Callable[[Row], str],
    prepare: Callable[[Any], Any] | None = None,
) -> Split | None:
    """Training and held-out problems, or None if the config names no source.

    With one source, `c.eval_problems` are held out, those whose seeded hash of the id is lowest; a problem that occurs
    twice is on one side. Errors: UserError, also if two sources share problems.
    """
    problems = carried(problems, config.slices)
    train = table(config, config.train_file, c, c.train_split, prepare)
    held_out = table(config, config.eval_file, c, c.eval_split, prepare)
    if train is None:
        return None
    name, found = train[0], problems(*train)
    if held_out is None:
        return cut(name, found, config.name, c, problem_id)
    others = problems(*held_out)
    known = {problem_id(p) for p in found}
    shared = sum(problem_id(p) in known for p in others)
    if shared:
        raise UserError(f"{held_out[0]} must hold no problem of {name}, got {shared} of {len(others)} in both")
    return found, others


def carried(problems: Problems, slices: Sequence[str]) -> Problems:
    """`problems` that keep the columns `slices` of their rows."""

    def read(name: str, table: Iterable[tuple[str, Row]]) -> list[Row]:
        table = list(table)
        return [{k: row[k] for k in slices if k in row} | p for p, (_, row) in zip(problems(name, table), table, strict=True)]

    return read


def table(config: TaskConfig, file: str | None, c: Settings, split: str | None, prepare: Prepare | None = None) -> Table | None:
    """The file's rows, else those of the data set, which it wins over; None if there is neither. Errors: UserError."""
    if file is not None:
        return file, [(files.place(file, n), row) for n, row in files.read_rows(file, ())]
    if c.dataset is None or split is None:
        return None
    name = f"data set {c.dataset}{f'/{c.dataset_name}' if c.dataset_name else ''} ({split})"
    try:
        import datasets
    except ImportError as e:
        raise UserError(f"{config.name}.dataset needs the datasets library, got none: pip install 'popo-jax[data]' ({e})") from e
    try:
        loaded = datasets.load_dataset(c.dataset, c.dataset_name, split=split)
        rows = list(prepare(loaded) if prepare else loaded)
    except Exception as e:  # its errors have no common kind: no network, no such set, no such split, a gated one
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UserError(f"{name} must be there to load, got {type(e).__name__}: {first}") from e
    if not rows:
        raise UserError(f"{name} must hold at least one problem, found none")
    return name, [(f"{name}, row {n}", row) for n, row in enumerate(rows, 1)]


def cut(name: str, problems: Sequence[Row], section: str, c: Settings, problem_id: Callable[[Row], str]) -> Split:
    """The problems without those held out, and these, each once. Errors: UserError if none is left."""
    ids = [problem_id(p) for p in problems]
    order = sorted(set(ids), key=lambda i: hashlib.sha256(f"{c.seed}:{i}".encode()).digest())
    if len(order) <= c.eval_problems:
        message = f"must leave a problem of {name} to train on, got {c.eval_problems} of {len(order)}"
        raise UserError(f"{section}.eval_problems {message}")
    chosen = set(order[: c.eval_problems])
    first = dict(reversed([(i, p) for i, p in zip(ids, problems, strict=True) if i in chosen]))
    return [p for i, p in zip(ids, problems, strict=True) if i not in chosen], [first[i] for i in order[: c.eval_problems]]
