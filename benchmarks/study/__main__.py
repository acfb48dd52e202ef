"""The study: `python -m benchmarks.study` runs what is missing and writes tables and figures.

--run [--workers 2] [--only TEXT] [--work DIR]   run the cells whose results are missing, resuming those begun
--solo                                           run the few whose wall time counts, one at a time on the whole machine
--tables                                         RESULTS.md, figures and the README's tables from the raw results alone
--smoke                                          every algorithm for a few steps, tables and figures, in a temporary folder
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

from benchmarks.study import runner
from benchmarks.study.figures import write
from benchmarks.study.plan import EVERY, MAIN, Cell, cells
from benchmarks.study.results import load
from benchmarks.study.tables import claims, document, where

HERE = Path(__file__).parent
README = HERE.parent.parent / "README.md"
BEGIN, END = "<!-- study: made by python -m benchmarks.study --tables -->", "<!-- end of study -->"
SOLO = ("grpo", "dapo", "popo", "popo-kl")
SMOKE = (
    *("--steps", "4", "--eval.every", "2", "--eval.problems", "32", "--checkpoint.every", "4", "--batch.prompts", "16"),
    *("--warm-start.steps", "40", "--warm-start.batch", "64"),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for flag in ("--run", "--solo", "--tables", "--smoke"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="run the cells whose name holds this text")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="where run directories and logs go")
    a = parser.parse_args()
    if not (a.run or a.solo or a.tables or a.smoke):
        a.run = a.tables = True
    if a.smoke:
        return smoke(a.workers)
    failed = []
    if a.run:
        failed += runner.run_all([c for c in cells() if a.only in c.name], a.work.resolve(), workers=a.workers)
    if a.solo:
        failed += solo(a.work.resolve())
    if a.tables:
        tables(runner.RESULTS, HERE, README)
    for cell in failed:
        print(f"{cell.name} ended badly; its log is beside its run directory", file=sys.stderr)
    return 1 if failed else 0


def solo(work: Path) -> list[Cell]:
    """Wall times: the main task's seed 0 again, one run at a time, every core."""
    failed = []
    for name in SOLO:
        cell = SoloCell(MAIN, name, 0)
        if not runner.paths(cell)[1].exists() and not runner.run(cell, work, runner.RESULTS, core=None, more=()):
            failed.append(cell)
    return failed


@dataclasses.dataclass(frozen=True)
class SoloCell(Cell):
    """A cell that keeps its results apart, as task `solo`."""

    @property
    def name(self) -> str:
        return f"solo/{self.algorithm}"


def tables(results: Path, out: Path, readme: Path | None) -> None:
    """One command from raw results to everything that is shown."""
    (out / "RESULTS.md").write_text(document(results))
    write(results, out / "figures")
    if readme is not None:
        text = readme.read_text()
        before, rest = text.split(BEGIN)
        readme.write_text(before + block(results) + rest.split(END, 1)[1])


def block(results: Path) -> str:
    """What the README shows between its two marks."""
    found = load(results)
    return f"{BEGIN}\n\n{claims(found)}\n\n{where(found)}\n\n{END}"


def smoke(workers: int) -> int:
    """Every algorithm for a few steps. Exit status 0 only if each ran to its end and gave tables and figures."""
    with tempfile.TemporaryDirectory() as folder:
        results, every = Path(folder) / "results", [Cell(MAIN, name, 0) for name in EVERY]
        failed = runner.run_all(every, Path(folder) / "work", results, workers=workers, more=SMOKE)
        for cell in failed:
            print((Path(folder) / "work" / f"{cell.name}.log").read_text(), file=sys.stderr)
        stopped = [r for runs in load(results).values() for r in runs if r.ending["stopped"]]
        tables(results, Path(folder), None)
        print(document(results))
        print(f"figures: {', '.join(sorted(p.name for p in (Path(folder) / 'figures').glob('*.png')))}")
        return 1 if failed or stopped or len(load(results)) < len(every) else 0


if __name__ == "__main__":
    sys.exit(main())
