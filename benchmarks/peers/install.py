"""Makes the peers' environments under a folder, pinned: they want other versions than ours, and than each other.

python -m benchmarks.peers.install DIR
"""

from __future__ import annotations

import argparse
import subprocess
import venv
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENTS = ("trl", "tunix")


def install(folder: Path, name: str) -> None:
    """DIR/name from requirements-name.txt; an environment that is there is brought to it."""
    venv.create(folder / name, with_pip=True)
    pip = [str(folder / name / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--requirement", str(HERE / f"requirements-{name}.txt")], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.absolute()
    for name in ENVIRONMENTS:
        install(folder, name)


if __name__ == "__main__":
    main()
