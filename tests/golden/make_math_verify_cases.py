"""Writes tests/tasks/math_verify_cases.json from math-verify's own tests: every parametrised case, as it stands there.

python -m tests.golden.make_math_verify_cases FOLDER        the unpacked source distribution of math-verify 0.9.0
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent.parent / "tasks" / "math_verify_cases.json"
LICENCE = (
    "The cases of math-verify 0.9.0's tests (github.com/huggingface/Math-Verify), copyright 2024 the HuggingFace Team, "
    "Apache License 2.0, in another format."
)


class Seen(Exception):
    """What a test would have compared."""


def comparing(gold: str, pred: str, match_types: tuple[str, ...] = ("latex", "expr"), precision: int = 6, **more: bool) -> None:
    """In place of their `compare_strings`: its arguments as those of our `grade`."""
    options: dict[str, Any] = {} if "latex" in match_types else {"latex": False}
    options |= {} if "expr" in match_types else {"expressions": False}
    options |= {} if precision == 6 else {"precision": precision}
    options |= {"strict": False} if more.get("strict") is False else {}
    relations = {"relations": True} if more.get("allow_set_relation_comp") else {}
    raise Seen({"kind": "grade", "gold": gold, "pred": pred} | options | relations)


def cases(folder: Path) -> list[dict[str, Any]]:
    sys.path.insert(0, str(folder))
    for name in [n for n in sys.modules if n == "tests" or n.startswith("tests.")]:
        del sys.modules[name]
    out = []
    for path in sorted((folder / "tests").glob("test_*.py")):
        module = importlib.import_module(f"tests.{path.stem}")
        for name, test in vars(module).items():
            for mark in getattr(test, "pytestmark", []):
                if mark.name == "parametrize" and name.startswith("test_"):
                    out += [case(module, name, i, test, mark.args[0], row) for i, row in enumerate(mark.args[1])]
    return out


def case(module: Any, name: str, i: int, test: Any, names: str, row: tuple[Any, ...]) -> dict[str, Any]:
    row = getattr(row, "values", row)
    fields = dict(zip([n.strip() for n in names.split(",")], row, strict=True))
    id_ = {"id": f"{module.__name__.removeprefix('tests.')}::{name}[{i}]"}
    if "config" in fields:  # extraction of letters: parsed, not compared
        c = fields["config"]
        options = {"strings": c.strings, "lowercase": c.lowercase, "anchored": not c.try_extract_without_anchor}
        return id_ | {"kind": "strings", "pred": fields["pred"], "expected": fields["expected"]} | options
    if hasattr(module, "compare_strings"):
        module.compare_strings = comparing
        try:
            test(**fields)
        except Seen as seen:
            return id_ | seen.args[0] | {"expected": int(fields["expected"])}
    if set(fields) == {"gold", "pred", "result"}:  # parse and verify as they are by default
        return (
            id_
            | {"kind": "grade", "gold": fields["gold"], "pred": fields["pred"], "boxed_priority": 50}
            | {"expected": fields["result"]}
        )
    raise SystemExit(f"{id_}: a case of a kind not known here")


if __name__ == "__main__":
    found = cases(Path(sys.argv[1]))
    OUT.write_text(json.dumps({"licence": LICENCE, "cases": found}, indent=1) + "\n")
    print(f"{len(found)} cases written to {OUT}")
