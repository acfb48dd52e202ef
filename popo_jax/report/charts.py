"""Figures as plotly draws them: plain JSON, needing no plotly to make. Colours are of Okabe and Ito, told apart by every eye.

A trace's `meta` says which series it is of, and its other x; `layout.meta` which other x all series have.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from popo_jax.report.frame import Figure, Series, Worry, to_plain
from popo_jax.report.text import visible

LIGHT = ("#0072B2", "#D55E00", "#009E73", "#B8569A", "#B98000", "#3C9BD0", "#5F5F5F", "#7A4B94")
DARK = ("#5AB4EC", "#F28C4C", "#3CC79B", "#E59AC6", "#EDBB4E", "#9AD5F7", "#B4B4B4", "#BC9BD6")
"""One for one the same series, on a light and a dark page. Okabe and Ito, "Color Universal Design", made darker (lighter) so
that thin lines have a contrast of 3 to 1."""
DASHES = ("solid", "dash", "dot", "dashdot")
"""Of lines beyond the eighth, sixteenth, ..."""
RED = "#B3261E"
MOST_POINTS = 1000
"""Of a series on the page."""


def plotly_figure(figure: Figure) -> dict[str, Any]:
    """{data, layout} for Plotly.newPlot, finite numbers or None in it. Long lines are thinned to MOST_POINTS, extremes kept."""
    data: list[dict[str, Any]] = []
    shared = _shared(figure)
    for i, series in enumerate(figure.series):
        data += _DRAW[figure.kind](figure, series, i, shared)
    out: dict[str, Any] = to_plain({"data": data, "layout": _layout(figure)})
    return out


def kept(columns: Sequence[np.ndarray], most: int) -> np.ndarray:
    """Indices, ascending, of at most `most` points: of each stretch the smallest and largest of every column, a gap if there is
    one, and the first and last of all. columns: float [n] each, NaN for a gap.
    """
    n = len(columns[0])
    if n <= most:
        return np.arange(n)
    gaps = np.isnan(columns[0])
    stretches = max((most - 2) // (2 * len(columns) + bool(gaps.any())), 1)
    edges = np.linspace(0, n, stretches + 1).astype(int)
    found = [0, n - 1]
    for a, b in itertools.pairwise(edges):
        for column in columns:
            part = column[a:b]
            if np.isfinite(part).any():
                found += [a + int(np.nanargmin(part)), a + int(np.nanargmax(part))]
        if gaps[a:b].any():
            found.append(a + int(np.argmax(gaps[a:b])))
    return np.unique(found)


def floats(values: Sequence[Any] | None, n: int) -> np.ndarray:
    """float [n]; NaN for None and what is not finite, or everywhere without values."""
    if values is None:
        return np.full(n, np.nan)
    x = np.array([math.nan if v is None else v for v in values], float)
    return np.where(np.isfinite(x), x, np.nan)


def in_view(figure: Figure, worry: Worry) -> tuple[float, float] | None:
    """Ends of a y axis that shows the data and the line; None if the line is so far away that the data would be squeezed to under
    a third of the height.
    """
    x, at = drawn_values(figure), worry.at
    if figure.log:
        if not at > 0:
            return None
        x, at = np.log10(x[x > 0]), math.log10(at)
    if not len(x):
        return None
    bottom, top = float(x.min()), float(x.max())
    if figure.kind in ("bar", "histogram", "area") and not figure.log:
        bottom, top = min(bottom, 0.0), max(top, 0.0)
    low, high = min(bottom, at), max(top, at)
    if not figure.log and bottom < top < low + (high - low) / 3 and bottom == low:
        return None
    if not figure.log and high - (high - low) / 3 < bottom < top and top == high:
        return None
    pad = 0.1 * (high - low) or abs(high) / 10 or 1.0
    least = low - pad if figure.log or low < 0 or low > 4 * pad else 0.0
    whole = figure.percent and figure.kind == "area" and math.isclose(high, 1.0, abs_tol=1e-6)
    return least, 1.0 if whole else high + pad


def drawn_values(figure: Figure) -> np.ndarray:
    """Heights that occur in it, ends of intervals too, stacked ones summed. Finite floats."""
    if figure.kind == "area" and len({len(s.y) for s in figure.series}) == 1:
        x = np.nansum([floats(s.y, len(s.y)) for s in figure.series], axis=0)
    else:
        parts = [floats(v, len(s.y)) for s in figure.series for v in (s.y, s.low, s.high)]
        x = np.concatenate(parts or [np.zeros(0)])
    return x[np.isfinite(x)]


def amount(value: float, percent: bool) -> str:
    """For labels: three digits, with a sign of percent."""
    return f"{100 * value:.3g}%" if percent else f"{value:.3g}"


def _literal(text: Any) -> str:
    """Plotly reads a few HTML tags in text: none of these is meant."""
    return visible(str(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _digits(x: np.ndarray) -> list[float | None]:
    """Six digits: more than any screen shows."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in x.tolist()]


def _places(x: Sequence[Any], at: np.ndarray) -> list[Any]:
    numeric = all(isinstance(v, (int, float, np.number)) for v in x)
    return [x[i].item() if isinstance(x[i], np.generic) else x[i] for i in at] if numeric else [_literal(x[i]) for i in at]


def _others(series: Series, at: np.ndarray) -> dict[str, list[float | None]]:
    return {k: _digits(floats(v, len(series.y))[at]) for k, v in series.other_x.items() if len(v) == len(series.y)}


def _shared(figure: Figure) -> np.ndarray | None:
    """The points to keep of stacked areas, which must be the same for all; where all have nothing, plotly would draw zeros."""
    if figure.kind != "area" or len({len(s.y) for s in figure.series}) != 1:
        return None
    y = np.array([floats(s.y, len(s.y)) for s in figure.series])
    there = np.flatnonzero(np.isfinite(y).any(0))
    return there[kept(list(y[:, there]), MOST_POINTS)]


def _format(figure: Figure) -> str:
    return ".2~%" if figure.percent else ".4~g"


def _hover(figure: Figure, interval: bool) -> str:
    d = _format(figure)
    return f"%{{y:{d}}}" + (f" (%{{customdata[0]:{d}}} to %{{customdata[1]:{d}}})" if interval else "")


def _line(figure: Figure, series: Series, i: int, shared: np.ndarray | None) -> list[dict[str, Any]]:
    n = len(series.y)
    y, low, high = floats(series.y, n), floats(series.low, n), floats(series.high, n)
    interval = bool((np.isfinite(low) & np.isfinite(high)).any())
    at = shared if shared is not None else kept([y, low, high] if interval else [y], MOST_POINTS)
    y, low, high, colour = y[at], low[at], high[at], LIGHT[i % len(LIGHT)]
    there = np.isfinite(y)
    alone = there & ~np.concatenate([[False], there[:-1]]) & ~np.concatenate([there[1:], [False]])
    trace = {
        "type": "scatter",
        "mode": "lines+markers" if alone.any() or there.sum() <= 30 else "lines",
        "name": _literal(series.name),
        "x": _places(series.x, at),
        "y": _digits(y),
        "line": {"color": colour, "width": 1.8 if len(at) <= 300 else 1.1, "dash": DASHES[i // len(LIGHT) % len(DASHES)]},
        "marker": {"color": colour, "size": 5},
        "hovertemplate": _hover(figure, interval),
        "meta": {"series": i, "other_x": _others(series, at)},
    }
    if not interval:
        return [trace]
    trace["customdata"] = list(zip(_digits(low), _digits(high), strict=True))
    return [_band(trace, low, high), trace]


def _band(line: Mapping[str, Any], low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    """The interval around a line: for each stretch without a gap a polygon, along the upper end and back along the lower."""
    there = np.flatnonzero(np.isfinite(low) & np.isfinite(high))
    stretches = [s for s in np.split(there, np.flatnonzero(np.diff(there) > 1) + 1) if len(s)]

    def around(ahead: Sequence[Any], back: Sequence[Any]) -> list[Any]:
        out: list[Any] = []
        for s in stretches:
            out += [*([None] if out else []), *(ahead[k] for k in s), *(back[k] for k in s[::-1])]
        return out

    return {
        "type": "scatter",
        "mode": "lines",
        "name": line["name"],
        "x": around(line["x"], line["x"]),
        "y": around(_digits(high), _digits(low)),
        "line": {"width": 0},
        "fill": "toself",
        "fillcolor": line["line"]["color"],
        "opacity": 0.18,
        "hoverinfo": "skip",
        "meta": {
            "series": line["meta"]["series"],
            "band": True,
            "other_x": {k: around(v, v) for k, v in line["meta"]["other_x"].items()},
        },
    }


def _area(figure: Figure, series: Series, i: int, shared: np.ndarray | None) -> list[dict[str, Any]]:
    trace = _line(figure, Series(series.name, series.x, series.y, other_x=series.other_x), i, shared)[0]
    line = {"color": trace["line"]["color"], "width": 0}
    more = {"mode": "lines", "stackgroup": "one", "fillcolor": trace["line"]["color"] + "B8", "line": line}
    return [trace | more]


def _bar(figure: Figure, series: Series, i: int, shared: np.ndarray | None) -> list[dict[str, Any]]:
    n = len(series.y)
    y, low, high = floats(series.y, n), floats(series.low, n), floats(series.high, n)
    interval = bool((np.isfinite(low) & np.isfinite(high)).any())
    at = np.arange(n)
    trace = {
        "type": "bar",
        "name": _literal(series.name),
        "x": _places(series.x, at),
        "y": _digits(y),
        "marker": {"color": LIGHT[i % len(LIGHT)], "line": {"width": 0}},
        "hovertemplate": _hover(figure, interval),
        "meta": {"series": i, "other_x": _others(series, at)},
    }
    if interval:
        ends = {"array": _digits(high - y), "arrayminus": _digits(y - low), "symmetric": False}
        trace["error_y"] = {"type": "data", "thickness": 1.2, "width": 3} | ends
        trace["customdata"] = list(zip(_digits(low), _digits(high), strict=True))
    return [trace]


def _histogram(figure: Figure, series: Series, i: int, shared: np.ndarray | None) -> list[dict[str, Any]]:
    trace, edges = _bar(figure, series, i, shared)[0], floats(series.x, len(series.y))
    width = np.diff(edges)
    width = np.concatenate([width, width[-1:] if len(width) else [1.0]])[: len(edges)]
    return [trace | {"offset": 0, "width": _digits(width), "opacity": 0.65 if len(figure.series) > 1 else 1.0}]


_DRAW: Mapping[str, Any] = {"line": _line, "area": _area, "bar": _bar, "histogram": _histogram}


def _layout(figure: Figure) -> dict[str, Any]:
    labels = [list(s.other_x) for s in figure.series]
    out = {
        "xaxis": _x_axis(figure),
        "yaxis": _y_axis(figure),
        "hovermode": "x unified" if figure.kind in ("line", "area") else "closest",
        "showlegend": False,
        "margin": {"l": 44, "r": 12, "t": 8, "b": 40},
        "barmode": "overlay" if figure.kind == "histogram" else "group",
        "bargap": 0.05 if figure.kind == "histogram" else 0.3,
        "meta": {"other_x": [k for k in (labels[0] if labels else []) if all(k in ks for ks in labels)]},
    }
    if figure.worry:
        _worry(figure, figure.worry, out)
    return out


def _x_axis(figure: Figure) -> dict[str, Any]:
    out = {"title": {"text": _literal(figure.x), "standoff": 8}, "exponentformat": "SI", "separatethousands": True}
    if any(isinstance(v, str) for s in figure.series for v in s.x):
        out["type"] = "category"
        names = list(dict.fromkeys(_literal(v) for s in figure.series for v in s.x))
        if len(names) <= 8:
            out |= {"tickvals": names, "ticktext": [n.replace(" ", "<br>") for n in names]}
    return out


def _y_axis(figure: Figure) -> dict[str, Any]:
    """From zero where that costs no detail."""
    x = drawn_values(figure)
    whole = figure.kind != "line" or (len(x) and 0 <= x.min() <= 0.5 * x.max())
    large = len(x) and np.abs(x).max() >= 1
    out = {"title": {"text": _literal(figure.y)}, "separatethousands": True, "rangemode": "tozero" if whole else "normal"}
    out["exponentformat"] = "SI" if large else "power"
    if figure.percent:
        out["tickformat"] = ".3~%"
    if figure.log:
        out["type"] = "log"
        x = np.append(x, figure.worry.at if figure.worry else np.nan)
        x = np.log10(x[x > 0])
        if len(x) and np.ptp(x) < 2:
            out |= {"tickformat": ".3~%" if figure.percent else ".3~g"} | ({"dtick": "D2"} if np.ptp(x) > 0.7 else {})
        elif len(x):
            out["dtick"] = math.ceil(np.ptp(x) / 5)
    return out


def _worry(figure: Figure, worry: Worry, layout: dict[str, Any]) -> None:
    """A dashed line with a label; a label at the edge where the line is out of sight."""
    label, ends = f"worry {worry.when} {amount(worry.at, figure.percent)}", in_view(figure, worry)
    note = {"xref": "paper", "x": 1, "xanchor": "right", "showarrow": False, "font": {"size": 11, "color": RED}}
    if ends is None:
        up = beyond(figure, worry) == "↑"
        edge = {"yref": "paper", "y": 1, "yanchor": "top"} if up else {"yref": "paper", "y": 0, "yanchor": "bottom"}
        layout["annotations"] = [note | edge | {"name": "worry beyond", "text": f"{label} {'↑' if up else '↓'}"}]
        return
    layout["yaxis"] |= {"range": list(ends), "autorange": False}
    ends_of_line = {"xref": "paper", "x0": 0, "x1": 1, "y0": worry.at, "y1": worry.at}
    line = {"dash": "dash", "width": 1.3, "color": RED}
    layout["shapes"] = [{"type": "line", "name": "worry", "line": line} | ends_of_line]
    at = math.log10(worry.at) if figure.log else worry.at  # annotations, unlike shapes, are placed by the logarithm
    layout["annotations"] = [note | {"name": "worry", "text": label, "y": at, "yanchor": "bottom"}]


def beyond(figure: Figure, worry: Worry) -> str:
    """Where the line is, seen from the figure: ↑, ↓, or nothing if it is in view."""
    if in_view(figure, worry):
        return ""
    x = drawn_values(figure)
    return "↑" if not len(x) or worry.at >= x.max() else "↓"
