"""Real runs of the quick start, each with a defect planted in it, and one without: what stands at the top of the page.

pytest -s -m slow tests/report/test_planted.py. A run takes one to two minutes on two cores; the warm start is made once.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from popo_jax import cli
from popo_jax.config import from_dict
from popo_jax.plain import read_mapping
from popo_jax.report.findings import findings
from popo_jax.report.read import read
from popo_jax.rules import resolve
from popo_jax.tasks import countdown

CONFIG = Path(__file__).parents[2] / "configs" / "countdown_tiny.yaml"
HERE = "tests.report.verifiers"
PLANTED = {
    "healthy": [],
    "dead-verifier": ["--tasks.0.verifier", f"{HERE}:dead"],
    "reward-hacking": ["--tasks.0.verifier", f"{HERE}:marker", "--steps", "60"],
    "staleness": ["--algorithm", "popo-stale", "--steps", "60"],
    "slice-untrained": ["--tasks.0.slices", "size", "--steps", "40", "--sample.max-prompt-tokens", "16"],
    "entropy-collapse": ["--tasks.0.verifier", f"{HERE}:nines", "--optim.learning-rate", "3e-4", "--steps", "80"],
}


@pytest.mark.slow
@pytest.mark.parametrize("defect", PLANTED)
def test_the_account_of_a_real_run_names_what_was_planted(defect, tmp_path):
    args = list(PLANTED[defect])
    if defect == "slice-untrained":
        args += _files(tmp_path)
    assert cli.main(["train", str(CONFIG), "--run-dir", str(tmp_path / "run"), *args]) in (0, 2)  # 2: no signal is left
    found = findings(read(tmp_path / "run"))
    print(defect, [(f.severity, f.name, f.sentence) for f in found])
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    names = [f.name for f in found]
    assert names == [] if defect == "healthy" else defect in names


def _files(folder: Path) -> list[str]:
    """Training with three numbers alone, evaluation with three and four in equal shares."""
    c = resolve(from_dict(read_mapping(CONFIG), str(CONFIG))).tasks[0]
    train, held_out = countdown.load(c)
    four, _ = countdown.generate(type(c.countdown)(**{**vars(c.countdown), "numbers": (4,), "train_problems": 300}))
    options = []
    for name, problems in (("train", train), ("eval", [p for pair in zip(held_out, four, strict=False) for p in pair])):
        lines = [json.dumps({"nums": list(map(int, p["nums"])), "target": int(p["target"])}) for p in problems]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        options += [f"--tasks.0.{name}-file", str(folder / f"{name}.jsonl")]
    return options
