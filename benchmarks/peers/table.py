"""The committed rows as Markdown: medians, and every contestant's time over ours, with the spread over the cycles.

python -m benchmarks.peers.table          writes the part of benchmarks/RESULTS.md that stands between its markers, from the
                                          rows in results/*.jsonl, which benchmarks.peers.run writes
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.contestants import CASES, OURS

RESULTS = Path(__file__).parent / "results"
SHOWN = Path(__file__).parents[1] / "RESULTS.md"
BEGIN, END = "<!-- peers: made by python -m benchmarks.peers.table -->", "<!-- end of peers -->"
Row = Mapping[str, Any]
TITLES = {"two_cores": "two cores", "one_core": "one pinned core"}
AIMS: Mapping[tuple[str, str, str], tuple[float, float]] = {
    ("sample", "one_core", "transformers"): (1.3, 1.6),
    ("sample", "two_cores", "transformers"): (1.0, 1.2),
    ("sample", "one_core", "tunix"): (2.0, 3.0),
    ("sample", "two_cores", "tunix"): (2.0, 3.0),
    ("train", "two_cores", "torch"): (0.9, 1.2),
    ("step", "two_cores", "trl"): (1.1, 1.5),
    ("step", "two_cores", "tunix"): (2.3, 3.5),
}
"""(case, mode, contestant) -> ratio below which it is a miss, and the ratio wished for."""
MICRO = f"{OURS}, micro-batch"
HEAD = (
    "| case | on | contestant | seconds: median (range) | tokens/s | peak MB | rounds "
    "| over ours (range) | over ours, micro-batch (range) | floor / aim |"
)
"""`over ours`: how many times as long as popo_jax at its defaults; above 1, ours is faster."""


def read(folder: Path = RESULTS) -> list[Row]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def kept(rows: Iterable[Row], case: str, mode: str, contestant: str) -> list[Row]:
    """Rounds that nothing disturbed."""
    wanted = (case, mode, contestant)
    return [r for r in rows if (r["case"], r["mode"], r["contestant"]) == wanted and r["kept"]]


def ratio(ours: Sequence[Row], theirs: Sequence[Row]) -> tuple[float, float, float]:
    """Median of theirs / median of ours; least and largest ratio within one cycle (NaN if no cycle has both)."""
    median = statistics.median(r["seconds"] for r in theirs) / statistics.median(r["seconds"] for r in ours)
    by_cycle = {r["cycle"]: r["seconds"] for r in ours}
    pairs = [r["seconds"] / by_cycle[r["cycle"]] for r in theirs if r["cycle"] in by_cycle] or [float("nan")]
    return median, min(pairs), max(pairs)


def line(rows: Sequence[Row], case: str, mode: str, contestant: str) -> str | None:
    """One Markdown row; None where nothing was measured."""
    mine = kept(rows, case, mode, contestant)
    if not mine:
        return None
    seconds = [r["seconds"] for r in mine]
    median = statistics.median(seconds)
    cells = [case, TITLES[mode], contestant, f"{median:.3f} ({min(seconds):.3f} - {max(seconds):.3f})"]
    cells += [f"{mine[0]['tokens'] / median:.0f}", f"{max(r['peak_mb'] for r in mine):.0f}"]
    tried = sum((r["case"], r["mode"], r["contestant"]) == (case, mode, contestant) for r in rows)
    cells += [f"{len(mine)} of {tried}"]
    aim = AIMS.get((case, mode, contestant))
    for base in (OURS, MICRO):
        ours = kept(rows, case, mode, base)
        cells += ["{:.2f} ({:.2f} - {:.2f})".format(*ratio(ours, mine)) if ours and contestant != base else ""]
    cells += [f"{aim[0]} / {aim[1]}" if aim else ""]
    return f"| {' | '.join(cells)} |"


def table(rows: Sequence[Row]) -> str:
    lines = (line(rows, case, mode, c.name) for case in CASES for mode in TITLES for c in CASES[case])
    return "\n".join([HEAD, "|" + "---|" * (HEAD.count("|") - 1), *filter(None, lines)])


def section(rows: Sequence[Row]) -> str:
    """What stands between the markers: where it was measured, with what, and the table."""
    of = {r["contestant"]: r for r in rows}
    versions = {f"{k} {v}" for r in of.values() for k, v in r["versions"].items()}
    facts = [", ".join(sorted({r[key] for r in rows})) for key in ("machine", "date", "commit")]
    return f"{BEGIN}\n\n{'; '.join(facts)}. {', '.join(sorted(versions))}.\n\n{table(rows)}\n\n{END}"


def replaced(text: str, rows: Sequence[Row]) -> str:
    """RESULTS.md with its section made anew."""
    before, rest = text.split(BEGIN)
    return before + section(rows) + rest.split(END, 1)[1]


def main() -> None:
    SHOWN.write_text(replaced(SHOWN.read_text(), read()))


if __name__ == "__main__":
    main()
