"""The page: one HTML file that needs no network, no server, and no other file. Plotly's own script, inlined, draws its figures.

What a model wrote reaches the page as data only: escaped by the template, or in JSON that page.js puts into text nodes. The
policy (CSP) lets nothing run but its own scripts, known by their hashes, and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from popo_jax.health import RULES
from popo_jax.report.charts import DARK, LIGHT, amount, beyond, floats, plotly_figure
from popo_jax.report.frame import Figure, Finding, Section, to_plain
from popo_jax.report.read import Run
from popo_jax.report.text import visible

MOST_ROWS = 60
"""Of a figure's table."""
LONG = 50
"""Lists of numbers from this length on are written once, wherever they occur."""
NOTHING = "\u2013"
"""In a table, where there is no number."""
CHECKED = tuple(rule.name for rule in RULES)
_IN_SCRIPT = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})


def render(
    title: str,
    findings: Sequence[Finding],
    sections: Sequence[Section],
    missing: Sequence[str],
    *,
    runs: Sequence[Run],
    checked: Sequence[str] = CHECKED,
) -> str:
    """The HTML. missing: sentences. checked: names of what findings would have been about."""
    from plotly.offline import get_plotlyjs  # half a second, that reports without a page need not wait

    files = resources.files("popo_jax.report")
    data = {
        "figures": {f.id: plotly_figure(f) for s in sections for f in s.figures if has_values(f)},
        "browsers": {s.id: _browser(s) for s in sections if s.data.get("groups")},
        "palettes": {"light": LIGHT, "dark": DARK},
    }
    plotly, code = get_plotlyjs(), (files / "page.js").read_text("utf-8")
    ids = {s.id for s in sections} | {f.id for s in sections for f in s.figures} | {t.id for s in sections for t in s.tables}
    template = _environment().from_string((files / "page.html").read_text("utf-8"))
    return template.render(
        title=title,
        findings=findings,
        sections=sections,
        missing=missing,
        runs=[_about(r) for r in runs],
        steps=sum(len(r.metrics.rows) for r in runs),
        checked=checked,
        ids=ids,
        data=Markup(embedded(_pooled(data))),
        css=Markup((files / "page.css").read_text("utf-8")),
        plotly=Markup(plotly),
        code=Markup(code),
        policy=f"default-src 'none'; script-src {_hash(plotly)} {_hash(code)}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'",
    )


def embedded(x: Any) -> str:
    """JSON that may stand in a script element: no character in it can end the element or begin a comment."""
    return json.dumps(_visible(to_plain(x)), ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_IN_SCRIPT)


def has_values(figure: Figure) -> bool:
    return any(np.isfinite(floats(s.y, len(s.y))).any() for s in figure.series)


def last_values(figure: Figure) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Columns and rows of the table beneath a figure: of lines the last value and the range, of bars all."""
    if figure.kind in ("line", "area"):
        columns = ("", f"last {figure.x}", figure.y, "interval", "lowest", "highest")
        rows = [_last(figure, i) for i in range(len(figure.series))]
        return (columns, rows) if any(r[3] for r in rows) else (_without(columns), [_without(r) for r in rows])
    places = list(dict.fromkeys(x for s in figure.series for x in s.x))
    values = [dict(zip(s.x, floats(s.y, len(s.y)).tolist(), strict=False)) for s in figure.series]
    rows = [(x, *(_amount(figure, v.get(x, math.nan)) for v in values)) for x in places[:MOST_ROWS]]
    rows += [(f"and {len(places) - MOST_ROWS:,} more", *("" for _ in values))] if len(places) > MOST_ROWS else []
    return (figure.x, *(s.name for s in figure.series)), rows


def number(x: Any) -> str:
    """A cell of a table."""
    if x is None or (isinstance(x, (float, np.floating)) and not math.isfinite(x)):
        return NOTHING
    if isinstance(x, (bool, np.bool_)):
        return "yes" if x else "no"
    if isinstance(x, (int, np.integer)):
        return f"{int(x):,}"
    if isinstance(x, (float, np.floating)):
        value = float(x)
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return visible(str(x))


def _without(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*row[:3], *row[4:])


def _last(figure: Figure, i: int) -> tuple[Any, ...]:
    series = figure.series[i]
    n = len(series.y)
    y, low, high = floats(series.y, n), floats(series.low, n), floats(series.high, n)
    there = np.flatnonzero(np.isfinite(y))
    if not len(there):
        return (series.name, None, NOTHING, "", NOTHING, NOTHING)
    k = int(there[-1])
    ends = f"{_amount(figure, low[k])} to {_amount(figure, high[k])}" if np.isfinite([low[k], high[k]]).all() else ""
    return (
        series.name,
        series.x[k],
        *(_amount(figure, v) for v in (y[k],)),
        ends,
        *(_amount(figure, f(y[there])) for f in (min, max)),
    )


def _amount(figure: Figure, x: float) -> str:
    return amount(float(x), figure.percent) if math.isfinite(x) else NOTHING


def _about(run: Run) -> Mapping[str, Any]:
    """The line that introduces a run."""
    steps: int = int(run.metrics.step[-1]) if len(run.metrics.rows) else 0
    planned = run.setting("steps")
    return {
        "name": run.name,
        "algorithm": run.setting("algorithm.name", ""),
        "tasks": ", ".join(run.tasks),
        "steps": f"{steps:,} of {planned:,} steps" if isinstance(planned, int) else f"{steps:,} steps",
        "state": "finished" if run.summary.get("finished") else "not finished",
    }


def _browser(section: Section) -> Mapping[str, Any]:
    return {k: section.data[k] for k in ("groups", "images") if k in section.data}


def _visible(x: Any) -> Any:
    if isinstance(x, str):
        return visible(x)
    if isinstance(x, dict):
        return {visible(k): _visible(v) for k, v in x.items()}
    return [_visible(v) for v in x] if isinstance(x, list) else x


def _pooled(x: Any) -> Mapping[str, Any]:
    """{lists, page}: in `page` every long list of numbers is {"$": its place in `lists`}; figures share many."""
    lists: dict[tuple[Any, ...], int] = {}

    def walk(v: Any) -> Any:
        if isinstance(v, Mapping):
            return {k: walk(w) for k, w in v.items()}
        if not isinstance(v, (list, tuple)):
            return v
        if len(v) >= LONG and all(w is None or isinstance(w, (int, float)) for w in v):
            return {"$": lists.setdefault(tuple(v), len(lists))}
        return [walk(w) for w in v]

    page = walk(x)
    return {"lists": list(lists), "page": page}


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _environment() -> jinja2.Environment:
    out = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    out.filters |= {"shown": lambda x: visible(str(x)), "number": number}
    out.globals |= {"last_values": last_values, "has_values": has_values, "amount": amount, "beyond": beyond}
    out.tests["amount"] = lambda x: isinstance(x, (int, float, np.number)) or x is None
    return out
