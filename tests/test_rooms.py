"""The house's directions: who may import whom, where jax.jit appears, what stays free of jax."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "popo_jax"
FLOOR = {"types", "health", "scenes", "config", "model_config", "task_config", "plain", "rules", "eval_args"}
NUMERICS = {"ops", "sharding"}
TRAINING = {"rl", "sampling", "models", *NUMERICS}
WIRING = {"problems", "policy", "build", "data", "tasks", "runtime", "run_dir", *TRAINING}
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "health": set(),
    "scenes": set(),
    "plain": set(),
    "config": set(),
    "model_config": set(),
    "task_config": set(),
    "rules": set(),
    "metrics": set(),
    "answers": {"metrics", "tasks"},
    "eval_args": set(),
    "cli": set(),  # and anything, inside functions
    "tasks": set(),
    "replay": set(),
    "sharding": set(),
    "ops": set(),
    "data": set(),
    "models": NUMERICS,
    "sampling": {"models", *NUMERICS},
    "rl": {"sampling", "models", "tasks", *NUMERICS},
    "runtime": {"sharding"},
    "split": set(),
    "build": {"runtime", "split", *TRAINING},
    "problems": {"tasks", "data"},
    "policy": {"models", "data"},
    "run_dir": {"runtime"},
    "restore": WIRING,
    "journal": {"runtime", "run_dir", "rl", "evaluate"},
    "costs": set(),
    "report": set(),
    "plan": {"costs", "split", *WIRING},
    "sft": WIRING,
    "evaluate": WIRING,
    "exam": WIRING | {"restore", "evaluate", "answers"},
    "export": WIRING | {"restore", "report"},
    "inspect": WIRING | {"restore"},
    "train": {"build", "data", "replay", "runtime", "run_dir", "journal", "evaluate", *TRAINING},
    "launch": WIRING | {"replay", "journal", "evaluate", "sft", "train"},
}
NO_JAX = [
    "types",
    "health",
    "scenes",
    "plain",
    "config",
    "model_config",
    "task_config",
    "rules",
    "metrics",
    "answers",
    "eval_args",
    "cli",
    "tasks",
    "tasks.pool",
    "tasks.worker",
    "tasks.graders",
    "tasks.mathematics",
    "tasks.geometry",
    "tasks.figures",
    "tasks.countdown",
    "replay.buffer",
    "replay.fill",
    "report.read",
    "report.frame",
    "report.text",
    "report.charts",
    "report.pictures",
    "report.samples",
    "report.page",
]


def files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.Module, *, lazily: bool) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of ours; without `lazily`, those inside functions are left out."""
    inside = {n for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if node in inside and not lazily:
            continue
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" if node.module == "popo_jax" else node.module for a in node.names]
        else:
            continue
        for name in names:
            if name.startswith("popo_jax."):
                yield node.lineno, name.split(".")[1]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_directions(path):
    here, tree = room(path), ast.parse(path.read_text())
    if here == "__init__":
        return
    allowed = ALLOWED[here] | FLOOR | {here}
    wrong = [f"line {n}: {there}" for n, there in imported(tree, lazily=here != "cli") if there not in allowed]
    assert not wrong, f"{path.name} ({here}) may import {sorted(allowed)}"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_jit_and_eval_are_where_they_belong(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "jit":
            assert room(path) in ("build", "sampling") or path.name == "hf.py", f"line {node.lineno}: jit"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"line {node.lineno}"


def test_there_are_no_circles():
    edges = {r: set() for r in ALLOWED}
    for path in files():
        if room(path) in edges:
            edges[room(path)] |= {t for _, t in imported(ast.parse(path.read_text()), lazily=False)} - {room(path)}
    left = dict(edges)
    while left:
        free = [r for r, to in left.items() if not to & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        left = {r: to for r, to in left.items() if r not in free}


def test_the_floor_claims_no_device():
    code = f"import sys, importlib\nfor m in {NO_JAX}: importlib.import_module('popo_jax.' + m)\nprint('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert out.stdout.strip() == "False"
