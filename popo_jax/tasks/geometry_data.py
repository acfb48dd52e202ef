"""Geometry problems with pictures from files and hub data sets: Geometry3k's columns, or JSONL beside its image files.

Columns: `problem` (or `question`), `answer` (or `solution`), `images` (or `image`): a path from the file's folder, a struct of
`bytes` and `path` as the `datasets` library stores it, or a list of these.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath

from popo_jax.task_config import TaskConfig
from popo_jax.tasks import figures, files, math_data, quantities, sources
from popo_jax.tasks.files import Row, Split
from popo_jax.types import UserError

MARK = "<image>"
_SCHEME = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")
COLUMNS = {"problem": ("problem", "question"), "answer": ("answer", "solution"), "images": ("images", "image")}


def read(config: TaskConfig, problem_id: Callable[[Mapping[str, Any]], str]) -> Split | None:
    """Training and held-out problems with `problem`, `answer` and `images`, or None if the config names no source.

    An image is {"bytes" or "path", "sha256" of its file}. Errors: UserError, also for an image file that is missing.
    """
    if config.eval_file is not None and config.train_file is None and config.geometry.dataset is None:
        raise UserError(f"eval_file must come with a train_file or geometry.dataset, got {config.eval_file} alone")
    return sources.read(config, config.geometry, _problems, problem_id, prepare=undecoded)


def read_all(config: TaskConfig, problem_id: Callable[[Mapping[str, Any]], str]) -> list[Row]:
    """Every problem of the training source, in order; of those that occur twice the first. For evaluation alone.

    Errors: UserError, also if the config names no source.
    """
    source = sources.table(config, config.train_file, config.geometry, config.geometry.train_split, undecoded)
    if source is None:
        raise UserError("expected a file or a data set of geometry problems, got neither")
    found: dict[str, Row] = {}
    for p in sources.carried(_problems, config.slices)(*source):
        found.setdefault(problem_id(p), p)
    return list(found.values())


def undecoded(table: Any) -> Any:
    """A data set whose columns of images give files as they are, not decoded."""
    from datasets import Image, Sequence

    for name in COLUMNS["images"]:
        feature = (table.features or {}).get(name)
        if isinstance(feature, Image):
            table = table.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            table = table.cast_column(name, Sequence(Image(decode=False)))
    return table


def digest(image: Mapping[str, Any]) -> str:
    """Of an image's file, or of what is to be drawn: 64 hex digits."""
    if "draw" in image:
        return hashlib.sha256(json.dumps(image["draw"], sort_keys=True).encode()).hexdigest()
    if "sha256" in image:
        return image["sha256"]
    return hashlib.sha256(image["bytes"] if "bytes" in image else epath.Path(image["path"]).read_bytes()).hexdigest()


def source(image: Mapping[str, Any]) -> Any:
    """The bytes of an encoded image file, the path of one, or a PIL image, drawn."""
    if "draw" in image:
        return figures.draw(image["draw"])
    return image["bytes"] if "bytes" in image else image["path"]


def _problems(name: str, table: Iterable[tuple[str, Row]]) -> list[Row]:
    table = list(table)
    columns = _columns(name, list(table[0][1]))
    folder = epath.Path(name).parent if name.endswith((".jsonl", ".parquet")) else epath.Path()
    return [_problem(place, row, columns, folder) for place, row in table]


def _columns(name: str, found: list[str]) -> dict[str, str]:
    """What is asked for -> the column that has it."""
    columns = {}
    for what, names in COLUMNS.items():
        fitting = [n for n in names if n in found]
        if not fitting:
            raise UserError(f"{name} must have a column {' or '.join(names)}, found {', '.join(found)}")
        columns[what] = fitting[0]
    return columns


def _problem(place: str, row: Row, columns: Mapping[str, str], folder: epath.Path) -> Row:
    """With its `place`, by which an error names it that is found later. Errors: UserError."""
    for column in columns.values():
        if row.get(column) is None:
            raise UserError(f"{place}: column {column} is missing or empty, found {files.shown(list(row))}")
    text, answer = row[columns["problem"]], math_data.answer_of(row[columns["answer"]], place, columns["answer"])
    files.need(isinstance(text, str) and bool(text.strip()), f"{place}: {columns['problem']}", "a text that is not blank", text)
    files.need(bool(quantities.normal(answer)), f"{place}: {columns['answer']}", "short and not blank", answer)
    given = row[columns["images"]]
    given = list(given) if isinstance(given, (list, tuple)) else [given]
    files.need(bool(given), f"{place}: {columns['images']}", "at least one image", given)
    images = [_image(f"{place}: {columns['images']}", image, folder) for image in given]
    marks = text.count(MARK)
    if marks not in (0, len(images)):
        raise UserError(f"{place}: {columns['problem']} must have one {MARK} for each of {len(images)} images, got {marks}")
    text = text.strip() if marks else MARK * len(images) + text.strip()
    return {"problem": text, "answer": answer, "images": images, "place": place}


def _image(place: str, given: object, folder: epath.Path) -> dict[str, Any]:
    """Errors: UserError for what is no image, or a file that cannot be read."""
    data, path = given if isinstance(given, bytes) else None, given if isinstance(given, str) else None
    if isinstance(given, Mapping):
        data, path = given.get("bytes"), given.get("path")
    if isinstance(data, bytes) and data:
        return {"bytes": data, "sha256": hashlib.sha256(data).hexdigest()}
    files.need(isinstance(path, str) and bool(path), place, "the path of an image file, or its bytes", given)
    files.need(not _SCHEME.match(str(path)), place, "the path of an image file, and no address", path)
    file = folder / str(path)  # an absolute path stays as it is
    files.need(not _SCHEME.match(str(file)), place, "an image file on this machine, or its bytes", str(file))  # beside a bucket's
    try:
        return {"path": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    except OSError as e:
        raise UserError(f"{place} must be a file that can be read, got {file}: {e.strerror or type(e).__name__}") from e
