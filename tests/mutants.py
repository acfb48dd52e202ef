"""Deliberate defects and the tests that must notice them: `python -m tests.mutants [--only NAME] [--jobs N]`.

tests/mutants.toml lists them. Each is applied to a copy of the project and its tests run there: exit code 1 of pytest
is a catch, 0 a survivor, anything else (import error, no such test, time limit) a broken entry. All must be caught.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "venv", "runs", "build", "dist", "__pycache__", ".*cache*", "*.egg-info")
NOT_THE_DEFECT = re.compile(r"^(FAILED|ERROR) .* - (NameError|ImportError|ModuleNotFoundError|SyntaxError)", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    """Path from the project's root."""
    old: str
    """Text that occurs exactly once in the file."""
    new: str
    test: tuple[str, ...]
    """Pytest node ids; with the defect, one of them must fail."""
    timeout: float = 300.0
    """Seconds for its tests."""


@dataclass(frozen=True)
class Outcome:
    status: str
    """caught, SURVIVED or BROKEN."""
    detail: str = ""
    seconds: float = 0.0


def load(path: Path) -> list[Mutant]:
    """The entries of a mutants.toml. Errors: TypeError for an unknown or missing key."""
    entries = tomllib.loads(path.read_text())["mutant"]
    return [Mutant(**{**e, "test": tuple(e["test"])}) for e in entries]


def mutated(m: Mutant, root: Path) -> str:
    """The file's text with the defect. Errors: ValueError if it cannot be placed, changes no code or does not parse."""
    source = (root / m.file).read_text()
    if source.count(m.old) != 1:
        raise ValueError(f"{m.name}: old must occur once in {m.file}, got {source.count(m.old)} times")
    text = source.replace(m.old, m.new)
    try:
        if m.file.endswith(".py") and ast.dump(ast.parse(text)) == ast.dump(ast.parse(source)):
            raise ValueError(f"{m.name}: new changes no code of {m.file}")
    except SyntaxError as e:
        raise ValueError(f"{m.name}: {m.file} does not parse with new: {e}") from None
    return text


@contextmanager
def copied(root: Path) -> Iterator[Path]:
    """A copy of the project in a temporary folder, without history, runs and caches."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder).resolve() / root.name
        shutil.copytree(root, copy, symlinks=True, ignore=LEFT_OUT)
        yield copy


def in_copy(command: Sequence[str], copy: Path, timeout: float) -> tuple[int | None, str]:
    """(exit code, output) of `python ...` with the copy first on the path; None if time ran out."""
    env = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400"}
    env.pop("PYTEST_ADDOPTS", None)
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=copy,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that what the tests started goes with them
    ) as process:
        try:
            out, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]
    return process.returncode, out


def pytest_in(copy: Path, tests: Sequence[str], timeout: float) -> tuple[int | None, str]:
    """Run node ids in the copy, slow ones too."""
    return in_copy(["-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider", "-m", "", *tests], copy, timeout)


def imported_from(copy: Path, file: str) -> str:
    """Where python finds the module of `file` when it runs in the copy."""
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    find = f"import importlib.util as u; s = u.find_spec({module!r}); print(s.origin if s else None)"
    return in_copy(["-c", find], copy, 60)[1].strip()


def check_unmutated(tests: Sequence[str], files: Sequence[str], root: Path, timeout: float) -> Outcome:
    """caught means fit to judge: the tests pass as the project stands, on the copy's own modules."""
    start = time.monotonic()
    with copied(root) as copy:
        for file in files:
            found = imported_from(copy, file)
            if found != str(copy / file):
                return Outcome("BROKEN", f"{file} is imported from {found}, not from the copy")
        code, out = pytest_in(copy, tests, timeout)
    seconds = time.monotonic() - start
    return Outcome("caught" if code == 0 else "BROKEN", "" if code == 0 else f"unmutated: {told(code, out)}", seconds)


def check(m: Mutant, root: Path) -> Outcome:
    """Apply one defect and run its tests."""
    start = time.monotonic()
    with copied(root) as copy:
        try:
            (copy / m.file).write_text(mutated(m, root))
        except (OSError, ValueError) as e:
            return Outcome("BROKEN", str(e))
        code, out = pytest_in(copy, m.test, m.timeout)
    seconds = time.monotonic() - start
    if code == 1 and not NOT_THE_DEFECT.search(out):
        return Outcome("caught", "", seconds)
    return Outcome("SURVIVED" if code == 0 else "BROKEN", told(code, out), seconds)


def told(code: int | None, out: str) -> str:
    """An exit code in words, and the last line that pytest printed."""
    last = ([line for line in out.splitlines() if line.strip()] or [""])[-1]
    words = {None: "time ran out", 0: "tests pass", 1: "tests fail", 2: "not collected", 4: "usage", 5: "no test"}
    return f"{words.get(code, f'exit code {code}')}: {last[:160]}"


def check_all(mutants: Sequence[Mutant], root: Path, jobs: int) -> dict[str, Outcome]:
    """Name -> outcome. Every set of tests is run once without a defect first; a set that fails there judges nothing."""
    files: dict[tuple[str, ...], set[str]] = {}
    for m in mutants:
        files.setdefault(m.test, set()).add(m.file)
    limits = {tests: max(m.timeout for m in mutants if m.test == tests) for tests in files}
    with ThreadPoolExecutor(jobs) as pool:
        ready = dict(
            zip(
                files,
                pool.map(lambda t: check_unmutated(t, sorted(f for f in files[t] if f.endswith(".py")), root, limits[t]), files),
                strict=True,
            )
        )
        outcomes = pool.map(lambda m: check(m, root) if ready[m.test].status == "caught" else ready[m.test], mutants)
        return dict(zip([m.name for m in mutants], outcomes, strict=True))


def table(outcomes: dict[str, Outcome]) -> str:
    """One line per mutant."""
    width = max(map(len, outcomes), default=0)
    return "\n".join(f"{name:{width}}  {o.status:8}  {o.seconds:5.1f} s  {o.detail}".rstrip() for name, o in outcomes.items())


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """0 if every chosen defect is caught, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="this one; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many run at once (default: one per core)")
    args = parser.parse_args(argv)
    known = load(root / "tests" / "mutants.toml")
    unknown = set(args.only or ()) - {m.name for m in known}
    if unknown:
        parser.error(f"no mutant named {', '.join(sorted(unknown))}; there are {', '.join(m.name for m in known)}")
    outcomes = check_all([m for m in known if not args.only or m.name in args.only], root, max(args.jobs, 1))
    print(table(outcomes))
    caught = sum(o.status == "caught" for o in outcomes.values())
    print(f"{caught} of {len(outcomes)} caught")
    return 0 if caught == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
