"""What a report is made of: figures, tables and findings, plain enough for JSON. Pages and programs read the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Series:
    """One line or row of bars. All of one length; NaN where there is nothing."""

    name: str
    x: Sequence[Any]
    y: Sequence[float]
    low: Sequence[float] | None = None
    """Lower and upper end of an interval around y."""
    high: Sequence[float] | None = None
    other_x: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    """The same points over other quantities, by their label: responses, tokens, hours."""


@dataclass(frozen=True)
class Worry:
    """The line beyond which experience says to worry."""

    at: float
    when: Literal["above", "below"]
    advice: str
    """What to do then."""


@dataclass(frozen=True)
class Figure:
    id: str
    """section/name, unique on the page."""
    title: str
    kind: Literal["line", "area", "bar", "histogram"]
    """area: stacked shares. histogram: x are the bins' left edges."""
    x: str
    """What the axis shows, with its unit."""
    y: str
    series: tuple[Series, ...]
    worry: Worry | None = None
    note: str = ""
    """How to read it, in a sentence."""
    percent: bool = False
    """y are fractions, shown in percent."""
    log: bool = False
    """A logarithmic y axis."""


@dataclass(frozen=True)
class Table:
    id: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    """Text, whole numbers, floats, None."""
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """Something a reader must know before anything else."""

    name: str
    """Stable, e.g. dead-verifier."""
    sentence: str
    """What was seen, where, with its numbers."""
    advice: str
    section: str
    """Where on the page the evidence is."""
    severity: Literal["alarm", "notice"] = "alarm"
    """An alarm: the run did not do what it was for, or may not have. A notice: look at it."""


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences: what the numbers assume, what is missing."""
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What is neither, e.g. samples to browse."""


def to_plain(x: Any) -> Any:
    """For JSON: dataclasses are dicts, arrays lists, numbers that are not finite None."""
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {f.name: to_plain(getattr(x, f.name)) for f in dataclasses.fields(x)}
    if isinstance(x, Mapping):
        return {str(k): to_plain(v) for k, v in x.items()}
    if isinstance(x, np.ndarray):
        return [to_plain(v) for v in x.tolist()]
    if isinstance(x, (list, tuple)):
        return [to_plain(v) for v in x]
    if isinstance(x, np.generic):
        return to_plain(x.item())
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    return x
