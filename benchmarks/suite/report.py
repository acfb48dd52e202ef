"""What a case reports: one JSON line of fixed keys; the table at the end; benchmarks/RESULTS.md from kept lines.

python -m benchmarks.suite.report          writes the part of benchmarks/RESULTS.md that stands between its markers
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from benchmarks.suite.measure import Peak, Program
from benchmarks.suite.sizes import ROOT

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
KEPT = Path(__file__).parent / "results"
BEGIN, END = "<!-- popo bench: made by python -m benchmarks.suite.report -->", "<!-- end of popo bench -->"
PACKAGES = ("popo-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclass(frozen=True)
class Line:
    """One case. None: does not apply. Times in seconds."""

    case: str
    size: str
    device: str
    versions: Mapping[str, str]
    commit: str | None
    date: str
    median_s: float
    min_s: float
    max_s: float
    n: int
    """Rounds, the first left out."""
    compile_s: float | None
    temp_bytes: int | None
    """Memory of the compiled program besides arguments and results."""
    flops: int | None
    """Model FLOPs of a round, by the formulas of popo_jax/costs/arithmetic.py."""
    tokens_per_s: float | None
    share_of_peak: float | None
    """flops / median_s / the best rate of a matrix product in the same rounds."""
    extra: Mapping[str, Any]
    """What only this case has, and `others`: cores that other processes kept busy meanwhile."""


def line(
    case: str,
    size: str,
    seconds: Sequence[float],
    *,
    program: Program | None = None,
    flops: int | None = None,
    tokens: int | None = None,
    peak: Peak | None = None,
    others: float | None = None,
    **extra: Any,
) -> Line:
    """A Line from its rounds; `tokens` and `flops` of one round."""
    median = statistics.median(seconds)
    extra["others"] = others
    if peak is not None:
        extra |= {"peak_flops_per_s": peak.flops_per_s, "copy_bytes_per_s": peak.bytes_per_s}
    return Line(
        case=case,
        size=size,
        **stamp(),
        median_s=median,
        min_s=min(seconds),
        max_s=max(seconds),
        n=len(seconds),
        compile_s=program.compile_s if program else None,
        temp_bytes=program.temp_bytes if program else None,
        flops=flops,
        tokens_per_s=None if tokens is None else tokens / median,
        share_of_peak=None if peak is None or flops is None else flops / median / peak.flops_per_s,
        extra={k: _rounded(v) for k, v in extra.items()},
    )


def dumps(x: Line) -> str:
    return json.dumps({k: _rounded(v) for k, v in asdict(x).items()})


@cache
def stamp() -> dict[str, Any]:
    """Device, versions, commit and date, the same on every line of a run."""
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return {"device": device(), "versions": versions, "commit": commit(), "date": today}


def device() -> str:
    """E.g. "4 x NVIDIA H200", or a CPU's name and how many of its cores this process may use."""
    first, n = jax.devices()[0], jax.device_count()
    if first.platform != "cpu":
        return f"{n} x {first.device_kind}"
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = next((x.partition(":")[2].strip() for x in text.splitlines() if x.startswith("model name")), platform.machine())
    return f"{name}, {cores()} cores"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str | None:
    """Short hash of the checkout, with + if files differ from it; None without git."""
    try:
        said = [
            subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for args in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return said[0] + ("+" if said[1] else "")


def _rounded(x: Any) -> Any:
    return float(f"{x:.5g}") if isinstance(x, float) else x


HEADS = ("case", "size", "median", "min - max", "n", "compile", "temporary", "GFLOP", "tokens/s", "of peak", "more")


def cells(x: Mapping[str, Any]) -> tuple[str, ...]:
    """A line of a table, of `asdict(Line)` or what its JSON gives back."""

    def of(key: str, text: str, scale: float = 1.0) -> str:
        return "" if x[key] is None else text.format(x[key] * scale)

    spread = f"{spell(x['min_s'])} - {spell(x['max_s'])}"
    more = ", ".join(f"{k} {_short(v)}" for k, v in x["extra"].items() if k not in ("peak_flops_per_s", "copy_bytes_per_s"))
    return (
        *(x["case"], x["size"], spell(x["median_s"]), spread, str(x["n"])),
        of("compile_s", "{:.1f} s"),
        of("temp_bytes", "{:.1f} MB", 1e-6),
        of("flops", "{:.3g}", 1e-9),
        of("tokens_per_s", "{:,.0f}"),
        of("share_of_peak", "{:.1%}"),
        more,
    )


def spell(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _short(v: Any) -> str:
    if isinstance(v, float):
        return f"{v:.3g}"
    return "-".join(_short(x) for x in v) if isinstance(v, (list, tuple)) else str(v)


def table(lines: Sequence[Line]) -> Table:
    """For the terminal."""
    out = Table(title=f"popo bench: {lines[0].device}" if lines else "popo bench")
    for head in HEADS:
        out.add_column(head, justify="left" if head in ("case", "size", "more") else "right")
    for x in lines:
        out.add_row(*cells(asdict(x)))
    return out


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A section of RESULTS.md: what it was measured on and with, the machine's peak, the table."""
    first = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    flops, copied = (
        [x["extra"][key] * 1e-9 for x in rows if key in x["extra"]] for key in ("peak_flops_per_s", "copy_bytes_per_s")
    )
    peak = (
        f"{min(flops):,.0f} to {max(flops):,.0f} GFLOP/s and {min(copied):,.0f} to {max(copied):,.0f} GB/s" if flops else "none"
    )
    body = ["| " + " | ".join(cells(x)) + " |" for x in rows]
    return "\n".join(
        [
            f"### {first['device']}",
            "",
            f"Commit `{first['commit']}`, {first['date']}; {versions}.",
            f"Peak (a matrix product, a copy; the best round beside each case): {peak}.",
            "",
            "| " + " | ".join(HEADS) + " |",
            "|" + "---|" * len(HEADS),
            *body,
        ]
    )


def section() -> str:
    """Everything between the markers, from the kept lines, one file a machine."""
    files = [[json.loads(x) for x in p.read_text().splitlines()] for p in sorted(KEPT.glob("*.jsonl"))]
    return "\n\n".join([BEGIN, *(markdown(rows) for rows in files), END])


def replaced(text: str) -> str:
    """RESULTS.md with its section made anew. Errors: ValueError if the markers are not there."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{RESULTS} must hold the lines {BEGIN} and {END}")
    return before + section() + after


def main() -> None:
    RESULTS.write_text(replaced(RESULTS.read_text()))


if __name__ == "__main__":
    main()
