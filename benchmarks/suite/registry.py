"""The cases by name, and the command that runs them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import rich.console

from benchmarks.suite import checkpoint, head, loop, padding, replay, report, sampler, startup, train_step, verifiers
from benchmarks.suite.report import Line
from benchmarks.suite.sizes import SIZES, Size, defaults
from popo_jax import plain
from popo_jax.runtime import mesh
from popo_jax.types import UserError

CASES: Mapping[str, Callable[[Size], Iterator[Line]]] = {
    "train_step": train_step.run,
    "padding": padding.run,
    "head": head.run,
    "sampler": sampler.run,
    "replay": replay.run,
    "verifiers": verifiers.run,
    "checkpoint": checkpoint.run,
    "startup": startup.run,
    "loop": loop.run,
}


def command(cases: Sequence[str], sizes: Sequence[str], out: Path | None) -> None:
    """Run `cases` (none: all) at `sizes` (none: the device's): a JSON line for each as it ends, to stdout and `out`; a table.

    Compiled programs are not kept, and none of an earlier process is taken: compile times are those of a cold start.
    Errors: UserError for an unknown case or size, and for a file that is there already.
    """
    check("case", cases, CASES)
    check("--size", sizes, SIZES)
    if out is not None and out.exists():
        raise UserError(f"popo bench: --out {out} must not exist yet")
    jax.config.update("jax_enable_compilation_cache", False)
    mesh.divide_cpu(min(mesh.cpu_devices(size.train, mesh.cores()) for size in SIZES.values() if size.on_cpu))
    platform = jax.default_backend()
    chosen = list(cases) or [name for name in CASES if name != "startup" or platform == "cpu"]
    lines = []
    for size in list(sizes) or defaults(platform):
        for case in chosen:
            for x in CASES[case](SIZES[size]):
                lines.append(x)
                text = report.dumps(x)
                print(text, flush=True)
                if out is not None:
                    with out.open("a") as f:
                        f.write(text + "\n")
    rich.console.Console(stderr=True, width=None if sys.stderr.isatty() else 200).print(report.table(lines))


def check(what: str, names: Sequence[str], known: Mapping[str, object]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"popo bench: {what} must be one of {', '.join(known)}, got {name}{plain.nearest(name, known)}")


def listing() -> str:
    """What `popo bench --list` prints."""
    cases = [f"  {name:12} {(run.__doc__ or '').strip().splitlines()[0]}" for name, run in CASES.items()]
    return "\n".join(["cases:", *cases, "sizes:", *[f"  {s.name:12} {s.about}" for s in SIZES.values()]])
