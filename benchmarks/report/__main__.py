"""How large a report of 1,000 steps and 256,000 samples is, and how long it takes to make and to open in headless Chromium.

python -m benchmarks.report                     a JSON line: MB, seconds to make, to the load event, to the first figure
python -m benchmarks.report --run RUN --out DIR desktop.png and phone.png of a run's page
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import plotly
from playwright.sync_api import Browser, sync_playwright

from popo_jax import cli
from tests.report import runs

CHROMIUM = "/usr/bin/chromium"
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
STEPS, PROMPTS, GROUP, LOADS = 1000, 32, 8, 5
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


def made(run: Path, page: Path) -> float:
    """Seconds that `popo report` took."""
    began = time.monotonic()
    assert cli.main(["report", str(run), "--out", str(page)]) == 0
    return time.monotonic() - began


def opened(browser: Browser, page: Path) -> tuple[float, float]:
    """Seconds from navigation to the load event, and until a first figure is drawn."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    began = time.monotonic()
    tab.goto(page.resolve().as_uri())
    tab.wait_for_selector(".js-plotly-plot .main-svg", timeout=30_000)
    drawn = time.monotonic() - began
    load = tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000
    tab.close()
    return load, drawn


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        run = runs.write(Path(folder) / "run", steps=STEPS, prompts=PROMPTS, group=GROUP, problems=2000, held_out=512, every=50)
        page = Path(folder) / "report.html"
        seconds = made(run, page)
        browser = p.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        times = [opened(browser, page) for _ in range(LOADS)]
        version = browser.version
        browser.close()
        return {
            "case": "report",
            "steps": STEPS,
            "samples": STEPS * PROMPTS * GROUP,
            "mb": page.stat().st_size / 1e6,
            "seconds_to_make": seconds,
            "seconds_to_load": [round(load, 2) for load, _ in times],
            "seconds_to_first_figure": [round(drawn, 2) for _, drawn in times],
            "median_load": statistics.median(load for load, _ in times),
            "chromium": version,
            "plotly": plotly.__version__,
            "date": datetime.date.today().isoformat(),
        }


def shots(run: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        page = Path(folder) / "report.html"
        made(run, page)
        browser = p.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        for name, (width, height) in SIZES.items():
            tab = browser.new_page(viewport={"width": width, "height": height})
            tab.goto(page.resolve().as_uri())
            tab.wait_for_selector(".js-plotly-plot .main-svg", timeout=30_000)
            tab.wait_for_timeout(1000)
            tab.screenshot(path=out / f"{name}.png")
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    if args.run is not None:
        shots(args.run, args.out)
    else:
        print(json.dumps(measure()))


if __name__ == "__main__":
    main()
