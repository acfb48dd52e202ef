"""The list of mutants fits the code as it stands, and the runner tells a catch from a survivor and from a broken entry."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from tests import mutants
from tests.mutants import ROOT, Mutant

LISTED = mutants.load(ROOT / "tests" / "mutants.toml")


def test_names_are_unique():
    assert [name for name, n in Counter(m.name for m in LISTED).items() if n > 1] == []
    assert len({(m.file, m.old, m.new) for m in LISTED}) == len(LISTED)


@pytest.mark.parametrize("m", LISTED, ids=lambda m: m.name)
def test_fits_the_code(m: Mutant):
    assert mutants.mutated(m, ROOT) != (ROOT / m.file).read_text()
    assert m.test
    for node in m.test:
        path, *names = re.sub(r"\[.*", "", node).split("::")
        assert (ROOT / path).is_file(), node
        body = ast.parse((ROOT / path).read_text()).body
        for name in names:
            found = [x for x in body if isinstance(x, (ast.FunctionDef, ast.ClassDef)) and x.name == name]
            assert found, node
            body = found[0].body


VALUE = "VALUE = 1  # one\n\n\ndef double(x):\n    return 2 * x\n"
TESTS = """
import pytest

from pack.value import VALUE, double

def test_double():
    assert double(3) == 6

def test_value():
    assert VALUE in (1, 2)

def test_already_red():
    assert VALUE == 5

def test_hangs():
    while VALUE == 3:
        pass

@pytest.mark.slow
def test_slow():
    assert VALUE == 1
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A small project with caches and runs that must stay behind."""
    root = tmp_path_factory.mktemp("project")
    files = {
        "pack/value.py": VALUE,
        "tests/test_value.py": TESTS,
        "pytest.ini": "[pytest]\nmarkers = slow\naddopts = -m 'not slow'\n",
        "runs/big.bin": "x",
        ".git/HEAD": "x",
        "pack/__pycache__/value.pyc": "x",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def defect(name: str, old: str, new: str, test: str, timeout: float = 60) -> Mutant:
    return Mutant(name, "pack/value.py", old, new, (f"tests/test_value.py::{test}",), timeout)


@pytest.fixture
def quick(monkeypatch):
    """No plugins in the small project's pytest: half its start-up."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def test_the_runner_tells_outcomes_apart(project, quick):
    cases = {
        "caught": ("return 2 * x", "return 3 * x", "test_double"),
        "slow": ("VALUE = 1", "VALUE = 2", "test_slow"),
        "survives": ("VALUE = 1", "VALUE = 2", "test_value"),
        "import": ("VALUE = 1", "VALUES = 1", "test_double"),
        "name": ("return 2 * x", "return two * x", "test_double"),
        "red": ("VALUE = 1", "VALUE = 2", "test_already_red"),
        "no test": ("VALUE = 1", "VALUE = 2", "test_absent"),
        "hangs": ("VALUE = 1", "VALUE = 3", "test_hangs", 3),
        "nowhere": ("VALUE = 7", "VALUE = 2", "test_value"),
    }
    got = mutants.check_all([defect(name, *case) for name, case in cases.items()], project, jobs=2)
    assert {name: o.status for name, o in got.items()} == {
        "caught": "caught",
        "slow": "caught",
        "survives": "SURVIVED",
        "import": "BROKEN",
        "name": "BROKEN",
        "red": "BROKEN",
        "no test": "BROKEN",
        "hangs": "BROKEN",
        "nowhere": "BROKEN",
    }
    assert "time ran out" in got["hangs"].detail and "unmutated" in got["red"].detail
    assert (project / "pack/value.py").read_text() == VALUE
    assert "SURVIVED" in mutants.table(got)


def test_a_module_found_elsewhere_judges_nothing(project):
    outcome = mutants.check_unmutated(["tests/test_value.py::test_value"], ["json/decoder.py"], project, 60)
    assert outcome.status == "BROKEN" and "not from the copy" in outcome.detail


def test_history_runs_and_caches_stay_behind(project):
    with mutants.copied(project) as copy:
        names = {str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file()}
    assert names == {"pack/value.py", "tests/test_value.py", "pytest.ini"}


@pytest.mark.parametrize(
    "old, new, why",
    [
        ("VALUE", "OTHER", "once in pack/value.py, got 2"),
        ("VALUE = 1  # one", "VALUE = 1  # uno", "changes no code"),
        ("VALUE = 1", "VALUE = (", "does not parse"),
    ],
)
def test_entries_that_are_no_defect_are_refused(project, old, new, why):
    source = project / "pack/value.py"
    source.write_text(VALUE + ("\n# VALUE\n" if why.startswith("once") else ""))
    with pytest.raises(ValueError, match=why):
        mutants.mutated(defect("x", old, new, "test_value"), project)
    source.write_text(VALUE)


def test_the_exit_code(project, capsys, quick):
    entry = '[[mutant]]\nname = "{}"\nfile = "pack/value.py"\nold = "VALUE = 1"\nnew = "VALUE = 2"\n'
    entry += 'test = ["tests/test_value.py::{}"]\n'
    (project / "tests/mutants.toml").write_text(entry.format("good", "test_slow") + entry.format("bad", "test_value"))
    assert mutants.main(["--only", "good"], project) == 0
    assert mutants.main([], project) == 1
    assert "1 of 2 caught" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        mutants.main(["--only", "godo"], project)
