"""Plotly figures and the page's HTML, without a browser."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from popo_jax.report.charts import DARK, LIGHT, MOST_POINTS, beyond, kept, plotly_figure
from popo_jax.report.frame import Figure, Finding, Section, Series, Table, Worry
from popo_jax.report.page import embedded, last_values, number, render
from popo_jax.report.read import read
from popo_jax.report.samples import section
from tests.report import runs

NAN = float("nan")


def line(y, x=None, **more):
    x = list(range(len(y))) if x is None else x
    kind = more.pop("kind", "line")
    fields = {k: more.pop(k) for k in ("low", "high", "other_x") if k in more}
    return Figure("a/b", "A title", kind, "step", "share", (Series("one", x, y, **fields),), **more)


def test_a_long_line_keeps_its_extremes():
    y = np.random.default_rng(0).normal(size=50_000)
    y[31_234], y[7], y[40_000:40_500] = 99.0, -77.0, NAN
    trace = plotly_figure(line(y, other_x={"tokens": np.arange(50_000) * 10}))["data"][0]
    assert len(trace["x"]) <= MOST_POINTS == 1000
    shown = dict(zip(trace["x"], trace["y"], strict=True))
    assert shown[31_234] == 99 and shown[7] == -77 and {0, 49_999} <= shown.keys()
    assert any(v is None for x, v in shown.items() if 40_000 <= x < 40_500)
    assert trace["meta"]["other_x"]["tokens"] == [10 * x for x in trace["x"]]
    for a, b in ((0, 10_000), (20_000, 30_000)):
        inside = [v for x, v in shown.items() if a <= x < b]
        assert max(inside) == pytest.approx(max(y[a:b]), rel=1e-5) and min(inside) == pytest.approx(min(y[a:b]), rel=1e-5)


@pytest.mark.parametrize("n", [0, 1, 999, 1000, 1001, 5000])
@pytest.mark.parametrize("columns", [1, 3, 20])
def test_thinning_keeps_to_its_bound(n, columns):
    x = np.random.default_rng(n).normal(size=(columns, n))
    x[0, n // 2 :: 7] = NAN
    found = kept(list(x), 1000)
    assert len(found) <= 1000 and (np.diff(found) > 0).all() and (len(found) == n or n > 1000)


def test_an_interval_is_a_band_with_gaps():
    figure = line([1.0, 2.0, NAN, 4.0], low=[0.5, 1.5, NAN, 3.5], high=[1.5, 2.5, NAN, 4.5], other_x={"hours": [0, 1, 2, 3]})
    band, curve = plotly_figure(figure)["data"]
    assert (
        band["fill"] == "toself" and band["x"] == [0, 1, 1, 0, None, 3, 3] and band["y"] == [1.5, 2.5, 1.5, 0.5, None, 4.5, 3.5]
    )
    assert (
        band["meta"]["other_x"]["hours"] == band["x"] and curve["y"] == [1, 2, None, 4] and curve["customdata"][0] == [0.5, 1.5]
    )
    assert curve["mode"] == "lines+markers"


def test_stacked_areas_share_their_points():
    y = np.random.default_rng(1).dirichlet([1, 1, 1], 4000).T
    figure = Figure("a/b", "t", "area", "step", "share", tuple(Series(str(i), np.arange(4000), v) for i, v in enumerate(y)))
    data = plotly_figure(figure)["data"]
    assert data[0]["x"] == data[1]["x"] == data[2]["x"] and len(data[0]["x"]) <= 1000
    assert np.sum([t["y"] for t in data], 0) == pytest.approx(1, abs=1e-5) and {t["stackgroup"] for t in data} == {"one"}


def test_areas_are_not_drawn_where_nothing_is_known():
    y = ([NAN, 0.2, NAN], [NAN, 0.8, 1.0])
    figure = Figure("a/b", "t", "area", "step", "share", tuple(Series(str(i), [0, 1, 2], v) for i, v in enumerate(y)))
    assert [(t["x"], t["y"]) for t in plotly_figure(figure)["data"]] == [([1, 2], [0.2, None]), ([1, 2], [0.8, 1.0])]


def test_bars_and_histograms():
    trace = plotly_figure(line([1.0, 3.0], ["<b>x</b>", "y"], kind="bar", low=[0.5, 2.0], high=[1.5, 5.0]))
    bar = trace["data"][0]
    assert bar["x"] == ["&lt;b&gt;x&lt;/b&gt;", "y"] and trace["layout"]["xaxis"]["type"] == "category"
    assert bar["error_y"]["array"] == [0.5, 2] and bar["error_y"]["arrayminus"] == [0.5, 1]
    histogram = plotly_figure(line([5.0, 6.0, 1.0], [0, 10, 30], kind="histogram"))["data"][0]
    assert histogram["width"] == [10, 20, 20] and histogram["offset"] == 0 and histogram["x"] == [0, 10, 30]


def test_the_worry_line():
    near = plotly_figure(line([0.1, 0.2], worry=Worry(0.3, "above", "do"), percent=True))["layout"]
    assert near["shapes"][0]["y0"] == 0.3 and near["shapes"][0]["line"]["dash"] == "dash" and near["yaxis"]["range"][1] > 0.3
    assert near["annotations"][0]["text"] == "worry above 30%" and near["yaxis"]["tickformat"].endswith("%")
    figure = line([0.001, 0.002], worry=Worry(0.3, "above", "do"))
    far = plotly_figure(figure)["layout"]
    assert "shapes" not in far and far["annotations"][0]["text"] == "worry above 0.3 ↑" and beyond(figure, figure.worry) == "↑"
    below = line([0.98, 0.99], worry=Worry(0.3, "below", "do"))
    assert beyond(below, below.worry) == "↓"
    log = plotly_figure(line([1e-7, 1e-6], worry=Worry(0.01, "above", "do"), log=True))["layout"]
    assert log["yaxis"]["type"] == "log" and log["annotations"][0]["y"] == -2 and log["shapes"][0]["y0"] == 0.01
    assert log["yaxis"]["range"][0] < -7 and -2 < log["yaxis"]["range"][1] < 0
    constant = plotly_figure(line([0.0, 0.0], worry=Worry(0.3, "above", "do")))["layout"]
    assert constant["shapes"][0]["y0"] == 0.3


@pytest.mark.parametrize("kind", ["line", "area", "bar", "histogram"])
@pytest.mark.parametrize("y", [[], [NAN], [NAN, NAN], [1.0], [0.0, 0.0], [math.inf, 1.0]])
@pytest.mark.parametrize("log", [False, True])
def test_odd_series_make_json_that_plotly_takes(kind, y, log):
    figure = line(y, kind=kind, log=log, worry=Worry(0.5, "below", "do"))
    made = plotly_figure(figure)
    json.dumps(made, allow_nan=False)
    pytest.importorskip("plotly.graph_objects").Figure(made)
    last_values(figure)
    html = render("t", [], [Section("a", "A", (figure,))], [], runs=[])
    assert ("There are no values to draw." in html) == (not any(map(math.isfinite, y)))


def test_colours_have_contrast():
    def light(c):
        parts = [int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(
            w * (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4)
            for w, p in zip((0.2126, 0.7152, 0.0722), parts, strict=True)
        )

    assert len(set(LIGHT)) == len(set(DARK)) == 8
    assert all((light("#fdfdfc") + 0.05) / (light(c) + 0.05) >= 3 for c in LIGHT)
    assert all((light(c) + 0.05) / (light("#14171a") + 0.05) >= 4.5 for c in DARK)


def test_last_values_are_in_the_table():
    figure = line([0.1, 0.4, 0.25, NAN], low=[0, 0.3, 0.2, NAN], high=[1, 0.5, 0.3, NAN], percent=True)
    columns, rows = last_values(figure)
    assert columns == ("", "last step", "share", "interval", "lowest", "highest")
    assert rows == [("one", 2, "25%", "20% to 30%", "10%", "40%")]
    columns, rows = last_values(line(list(range(100)), [f"c{i}" for i in range(100)], kind="bar"))
    assert len(rows) == 61 and rows[1] == ("c1", "1") and rows[-1][0] == "and 40 more"
    assert [number(v) for v in (None, NAN, True, 1234567, 0.123456, 1e-4, 12345.6, "a\x1b")] == (
        ["\u2013", "\u2013", "yes", "1,234,567", "0.1235", "0.0001", "12,346", "a␛"]
    )


class Elements(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.all: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.all and self.all[-1][0] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


HOSTILE = "</script><script>window.broken=1</script><img src=x onerror=alert(1)>&amp;\u2028\x1b[31m\u202e"


def test_what_a_model_wrote_stays_text():
    figure = line([1.0], note=HOSTILE, worry=Worry(2.0, "above", HOSTILE))
    figure = Figure(**{**vars(figure), "title": HOSTILE, "y": HOSTILE, "series": (Series(HOSTILE, [HOSTILE], [1.0]),)})
    data = {"groups": [{"text": HOSTILE}], "images": {}}
    part = Section("a", HOSTILE, (figure,), (Table("a/t", HOSTILE, (HOSTILE,), ((HOSTILE,),), HOSTILE),), (HOSTILE,), data)
    findings = [Finding(HOSTILE, HOSTILE, HOSTILE, HOSTILE)]
    html = render(HOSTILE, findings, [part], [HOSTILE], runs=[], checked=[HOSTILE])
    page = Elements(html)
    assert len([t for t, _ in page.all if t == "script"]) == 3 and not any(t == "img" for t, _ in page.all)
    assert not any(k.startswith("on") for _, attrs in page.all for k in attrs)
    ours = html.replace(re.search(r"<script>/\*\*.*?</script>", html, re.S)[0], "")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u2028\u2029\u202a-\u202e]", ours)
    inside = html.split('id="popo-data">')[1].split("</script>")[0]
    assert not set("<>&\u2028\u2029") & set(inside)
    assert json.loads(inside)["page"]["browsers"]["a"]["groups"][0]["text"] == (
        HOSTILE.replace("\u2028", "⟨U+2028⟩").replace("\x1b", "␛").replace("\u202e", "⟨U+202E⟩")
    )


def test_embedded_json_is_the_same_json():
    x = {"a": ["<&>", 1.5, None, float("nan"), "é\u2029"], "b": np.arange(3)}
    assert json.loads(embedded(x)) == {"a": ["<&>", 1.5, None, None, "é⟨U+2029⟩"], "b": [0, 1, 2]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read(runs.write(tmp_path_factory.mktemp("runs") / "tidy", steps=20))


def test_the_page_says_what_was_found_and_what_is_missing(run):
    m = run.metrics
    series = Series("reward", m.step, m["reward/mean"], other_x={"tokens": m["tokens_generated_total"]})
    parts = [
        Section("learning", "Is it learning?", (Figure("learning/reward", "Reward", "line", "step", "reward", (series,)),)),
        section(run),
    ]
    good = Elements(render("tidy", [], parts, [], runs=[run]))
    assert "Nothing to worry about was found. Looked for: dead verifier, saturated," in good.text
    assert "20 of 20 steps finished" in good.text and "missing" not in good.text
    bad = [
        Finding("dead-verifier", "All is wrong.", "Read them", "learning"),
        Finding("odd", "Odd.", "Look", "learning/reward", "notice"),
    ]
    page = Elements(
        render("tidy", [*bad, Finding("lost", "L.", "a", "nowhere")], parts, ["summary.json is not there."], runs=[run])
    )
    assert "Nothing to worry" not in page.text and "1 piece missing" in page.text and "summary.json is not there." in page.text
    ids = [a["id"] for _, a in page.all if "id" in a]
    links = [a["href"][1:] for t, a in page.all if t == "a"]
    assert (
        len(ids) == len(set(ids))
        and set(links) <= set(ids)
        and {"learning", "samples", "findings", "learning/reward"} <= set(links)
    )
    assert [a["class"] for _, a in page.all if "finding" in a.get("class", "").split()] == [
        "finding alarm",
        "finding notice",
        "finding alarm",
    ]


def test_figures_hold_the_numbers_of_the_files(run):
    m = run.metrics
    series = Series("reward", m.step, m["reward/mean"], other_x={"tokens": m["tokens_generated_total"]})
    html = render("t", [], [Section("l", "L", (Figure("l/r", "Reward", "line", "step", "reward", (series,)),))], [], runs=[run])
    whole = json.loads(html.split('id="popo-data">')[1].split("</script>")[0])
    trace = whole["page"]["figures"]["l/r"]["data"][0]
    rows = [json.loads(row) for row in (run.path / "metrics.jsonl").read_text().splitlines()]
    for got, key in (
        (trace["x"], "step"),
        (trace["y"], "reward/mean"),
        (trace["meta"]["other_x"]["tokens"], "tokens_generated_total"),
    ):
        got = whole["lists"][got["$"]] if isinstance(got, dict) else got
        assert got == [pytest.approx(r[key], rel=1e-5) if r.get(key) is not None else None for r in rows]


def test_runs_without_anything(tmp_path):
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    empty = read(tmp_path)
    page = Elements(render("empty", [], [section(empty), Section("b", "B", notes=("Nothing.",))], empty.missing, runs=[empty]))
    assert "Nothing could be checked: no step of the run is recorded." in page.text and "0 of 3 steps not finished" in page.text
    assert "There are no samples to browse." in page.text and "Nothing to worry about" not in page.text


def test_the_policy_forbids_everything_else(run):
    html = render("t", [], [], [], runs=[run])
    policy = next(a["content"] for _, a in Elements(html).all if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "connect-src" not in policy and "http" not in policy
    assert "unsafe-inline" not in policy.split("style-src")[0] and "unsafe-eval" not in policy
    assert not re.search(r"\.innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", html.rsplit("<script>", 1)[1])
    assert not any(k in ("src", "href") and not v.startswith(("#", "data:")) for _, a in Elements(html).all for k, v in a.items())


def test_the_wheel_holds_the_pages_parts(tmp_path):
    root = Path(__file__).parents[2]
    hatchling = pytest.importorskip("hatchling", reason="the build backend is not installed").__name__
    code = f"from {hatchling}.build import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {f"popo_jax/report/page.{k}" for k in ("py", "html", "css", "js")} <= set(names)
