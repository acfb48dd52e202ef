"""The page in a real browser: that it loads nothing, runs nothing but its own script, and works."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from popo_jax.report.frame import Figure, Finding, Section, Series, Table, Worry
from popo_jax.report.page import render
from popo_jax.report.read import read
from popo_jax.report.samples import section
from tests.report import runs

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
HOSTILE = (
    "<script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"
    "<svg onload='window.broken = 3'>\x1b[31mred\x1b[0m \u202edlrow\u202c שלום </pre></script>{{ 7 * 7 }}"
)
SHOWN = HOSTILE.replace("\x1b", "␛").replace("\u202e", "⟨U+202E⟩").replace("\u202c", "⟨U+202C⟩")


@pytest.fixture(scope="module")
def browser():
    must = os.environ.get("POPO_BROWSER") == "1"
    path = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if not (path and sync_playwright):
        (pytest.fail if must else pytest.skip)("needs Chromium and the Python package playwright")
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=path, args=list(FLAGS))
        yield found
        found.close()


def figures(run):
    m = run.metrics
    over = {"tokens": m["tokens_generated_total"], "responses": m["rollouts_total"]}
    one = Series("training", m.step, m["accuracy/train"], m["accuracy/train"] - 0.1, m["accuracy/train"] + 0.1, over)
    two = Series(HOSTILE, m.step, m["reward/mean"], other_x=over)
    shares = [Series(k, m.step, m[f"groups/{k}"], other_x=over) for k in ("effective", "all_right", "all_wrong")]
    return (
        Figure("learning/accuracy", "Accuracy", "line", "step", "share", (one, two), percent=True, note=HOSTILE),
        Figure(
            "learning/groups", "Groups", "area", "step", "share", tuple(shares), Worry(0.02, "below", "easier ones"), percent=True
        ),
        Figure("learning/reasons", "Reasons", "bar", "reason", "answers", (Series("n", ["right", HOSTILE], [3, 4]),)),
        Figure("learning/lengths", "Lengths", "histogram", "tokens", "answers", (Series("n", [0, 10, 20], [3, 4, 1]),)),
        Figure("learning/norm", "Norm", "line", "step", "norm", (Series("norm", m.step, m["grad_norm"]),), log=True),
        Figure("learning/empty", "Empty", "line", "step", "norm", (Series("norm", [0.0], [np.nan]),)),
    )


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    wrong = lambda rng, prompt, right: f"right {prompt}" if right else HOSTILE  # noqa: E731
    run = read(runs.write(folder / "run", steps=30, answer=wrong))
    table = Table("learning/table", "Table", ("name", "value"), ((HOSTILE, 1.5), ("long " * 60, 2)))
    parts = [
        Section("learning", "Is it learning?", figures(run), (table,), (HOSTILE,)),
        Section("correction", "Is the correction healthy?", notes=("Nothing was replayed.",)),
        section(run),
    ]
    found = [Finding("dead-verifier", HOSTILE, HOSTILE, "learning/accuracy")]
    file = folder / "report.html"
    file.write_text(render(HOSTILE, found, parts, [HOSTILE], runs=[run]), "utf-8")
    return file, run


@pytest.fixture
def opened(browser, page_file):
    """open(width, ...) -> (page, what the console said, what was asked for)"""
    contexts = []

    def open_(width=1280, **more):
        context = browser.new_context(viewport={"width": width, "height": 900}, **more)
        contexts.append(context)
        page, said, asked = context.new_page(), [], []
        page.on("console", lambda m: said.append(m.text))
        page.on("pageerror", lambda e: said.append(str(e)))
        page.on("request", lambda r: asked.append(r.url))
        page.goto(page_file[0].as_uri())
        page.locator(".plot").first.scroll_into_view_if_needed()
        page.wait_for_selector(".main-svg")
        return page, said, asked

    yield open_
    for context in contexts:
        context.close()


def scroll_through(page):
    for y in range(0, page.evaluate("document.documentElement.scrollHeight"), 600):
        page.evaluate(f"scrollTo(0, {y})")
        page.wait_for_timeout(120)


def test_all_is_there_and_nothing_is_loaded(opened, page_file):
    page, said, asked = opened()
    first, loaded = page.evaluate(
        "[performance.getEntriesByName('first-figure')[0]?.startTime, performance.getEntriesByType('navigation')[0].loadEventEnd]"
    )
    print(f"load event after {loaded:.0f} ms, first figure drawn after {first or float('nan'):.0f} ms")
    scroll_through(page)
    assert said == []
    assert asked == [page_file[0].as_uri()]
    assert page.locator("main > section h2").all_inner_texts() == [
        "Findings",
        "Is it learning?",
        "Is the correction healthy?",
        "Samples",
    ]
    assert page.locator(".plot .plotly").count() >= 5 and page.locator("figure").count() == 6
    assert page.locator(".contents li").count() == 4 and page.get_by_text("There are no values to draw.").count() == 1
    page.get_by_role("link", name="See the evidence").click()
    assert page.url.endswith("#learning/accuracy")


def test_figures_out_of_sight_wait(opened):
    page, _, _ = opened(390)
    drawn = page.locator(".plot.js-plotly-plot")
    assert 0 < drawn.count() < 5
    scroll_through(page)
    assert drawn.count() == 5


def test_nothing_that_a_model_wrote_runs(opened):
    page, said, _ = opened()
    page.locator("select[name=Verdict]").select_option("wrong")
    page.wait_for_timeout(250)
    scroll_through(page)
    answer = page.locator(".answer.wrong pre").first
    assert answer.text_content() == SHOWN and answer.get_attribute("dir") == "auto"
    assert answer.evaluate("e => getComputedStyle(e).unicodeBidi") == "isolate" and answer.evaluate("e => e.children.length") == 0
    assert page.evaluate("window.broken") is None and said == []
    assert page.locator("main script, main img, main svg[onload]").count() == 0
    assert page.locator(".finding p").first.text_content() == SHOWN and page.title() == SHOWN
    assert page.locator(".legend bdi").nth(1).text_content() == SHOWN
    assert page.locator("#learning\\/table td").first.text_content() == SHOWN


def test_the_policy_stops_what_would_slip_through(opened):
    page, said, asked = opened()
    before = len(asked)
    page.evaluate(
        """() => {
        const s = document.createElement("script"); s.textContent = "window.broken = 4"; document.body.append(s);
        const d = document.createElement("div"); d.innerHTML = "<img src='http://127.0.0.1:9/x' onerror='window.broken = 5'>";
        document.body.append(d);
        }"""
    )
    page.wait_for_timeout(300)
    assert page.evaluate("window.broken") is None and any("Content Security Policy" in s for s in said)
    assert all("127.0.0.1" not in u for u in asked[before:]) or any("img-src" in s for s in said)


def counted(page):
    page.wait_for_timeout(250)
    return int(page.locator(".pager span").inner_text().split(" of ")[-1].split()[0])


def test_filters_find_what_they_say(opened, page_file):
    page, _, _ = opened()
    groups = section(page_file[1]).data["groups"]
    assert counted(page) == len(groups)

    def expect(test):
        wanted = [g for g in groups if test(g)]
        assert counted(page) == len(wanted) > 0
        assert page.locator(".group .head b").all_inner_texts() == [f"Step {g['step']}" for g in wanted[:5]]

    page.locator("select[name=Verdict]").select_option("right")
    expect(lambda g: any(a["reason"] == "right" for a in g["answers"]))
    page.locator("select[name=Signal]").select_option("effective")
    expect(lambda g: g["signal"] == "effective")
    page.locator("select[name=level]").select_option("2")
    expect(lambda g: g["signal"] == "effective" and g["slices"]["level"] == "2")
    page.locator("input[name=from]").fill("5")
    page.locator("input[name=to]").fill("20")
    expect(lambda g: g["signal"] == "effective" and g["slices"]["level"] == "2" and 5 <= g["step"] <= 20)
    page.locator("input[name=replayed]").check()
    expect(lambda g: g["signal"] == "effective" and g["slices"]["level"] == "2" and 5 <= g["step"] <= 20 and g["uses"])
    assert "replayed" in page.locator(".group .replays").first.inner_text()
    page.reload()
    id_ = groups[3]["prompt_id"]
    page.locator("input[name=text]").fill(f"RIGHT {id_}".lower())
    expect(lambda g: any(f"right {id_}" in a["text"] for a in g["answers"]))
    page.locator("input[name=text]").fill("no such text")
    assert counted(page) == 0 and page.get_by_role("button", name="Later").is_disabled()


def test_groups_are_paged_by_keyboard(opened, page_file):
    page, _, _ = opened()
    groups = section(page_file[1]).data["groups"]
    ids = lambda: [t.split()[-1] for t in page.locator(".group .head bdi", has_text="group ").all_inner_texts()]  # noqa: E731
    assert ids() == [str(g["group_id"]) for g in groups[:5]]
    page.get_by_role("button", name="Later").focus()
    page.keyboard.press("Enter")
    assert ids() == [str(g["group_id"]) for g in groups[5:10]]
    page.get_by_role("button", name="Earlier").click()
    assert ids() == [str(g["group_id"]) for g in groups[:5]]
    page.reload()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the report"


def test_the_horizontal_axis_can_be_switched(opened, page_file):
    page, _, _ = opened()
    m = page_file[1].metrics
    shown = "document.querySelector('[data-figure=\"learning/accuracy\"]').data.find(t => !t.meta.band).x"
    assert page.evaluate(shown) == m.step.tolist()
    page.locator("#axis").select_option("tokens")
    page.wait_for_timeout(200)
    assert page.evaluate(shown)[1:] == m["tokens_generated_total"].tolist()[1:]
    assert page.locator('[data-figure="learning/accuracy"] .xtitle').text_content() == "tokens"
    scroll_through(page)
    assert page.locator('[data-figure="learning/norm"] .xtitle').text_content() == "step"


def test_figures_offer_nothing_that_leaves_the_page(opened):
    page, said, asked = opened()
    place = page.locator(".plot").first
    place.hover()
    buttons = place.locator(".modebar-btn")
    assert [b.get_attribute("data-title") for b in buttons.all()] == ["Download plot as a PNG", "Reset axes"]
    with page.expect_download() as download:
        buttons.first.click()
    assert download.value.suggested_filename.endswith(".png") and said == []
    assert all(u.startswith(("file:", "data:", "blob:")) for u in asked)


def test_a_series_can_be_hidden(opened):
    page, _, _ = opened()
    key = page.locator('figure[id="learning/accuracy"] .legend button').first
    key.click()
    assert key.get_attribute("aria-pressed") == "false"
    drawn = "document.querySelector('[data-figure=\"learning/accuracy\"]').data.filter(t => t.visible).map(t => t.meta.series)"
    assert page.evaluate(drawn) == [1]


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_no_width_scrolls_sideways(opened, width):
    page, said, _ = opened(width)
    scroll_through(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width and said == []
    box = page.locator(".answers").first
    assert width > 800 or box.evaluate("e => e.scrollWidth > e.clientWidth"), "answers scroll inside their box"


def test_dark_pages_have_dark_colours(opened):
    colours = """() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
        document.querySelector('.scatterlayer .js-line').style.stroke]"""
    light, _, _ = opened(color_scheme="light")
    dark, _, _ = opened(color_scheme="dark")
    first, second = light.evaluate(colours), dark.evaluate(colours)
    assert all(a != b for a, b in zip(first, second, strict=True))
    light.emulate_media(color_scheme="dark")
    light.wait_for_timeout(400)
    assert light.evaluate(colours) == second, "changes while the page is open"


def test_print_shows_every_figure_and_few_samples(opened, tmp_path):
    page, said, _ = opened(color_scheme="dark")
    page.evaluate(
        """addEventListener('beforeprint', () => {
        window.printed = [document.querySelectorAll('.plot.js-plotly-plot').length,
            document.querySelector('.gridlayer path').style.stroke, getComputedStyle(document.body).backgroundColor];
        })"""
    )
    page.pdf(path=str(tmp_path / "report.pdf"))
    assert page.evaluate("window.printed") == [5, "rgb(229, 229, 229)", "rgb(255, 255, 255)"] and said == []
    page.emulate_media(media="print")
    assert page.locator(".group:visible").count() == 1 and page.locator(".filters:visible, .contents:visible").count() == 0
    page.emulate_media(media="screen", color_scheme="dark")
    page.wait_for_timeout(500)
    wide = page.locator(".plot").first
    assert wide.evaluate("e => Math.abs(e.querySelector('.main-svg').getBoundingClientRect().width - e.clientWidth)") < 2
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
