"""One run in several processes of this machine, with the resume tests' verifier."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

LIMIT = 300
"""Seconds that a run here may take."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


def start(
    n: int,
    args: Sequence[str],
    *,
    devices: int,
    logs: Path,
    point: str = "never",
    step: int = 0,
    env: Mapping[str, str] | None = None,
) -> list[subprocess.Popen[str]]:
    """`popo train *args` as n processes of `devices` devices each; what process i says is in logs/i.out and logs/i.err."""
    logs.mkdir(parents=True, exist_ok=True)
    told = [] if n == 1 else ["--coordinator", f"localhost:{free_port()}", "--processes", str(n)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    started = []
    for i in range(n):
        command = [sys.executable, "-m", "tests.killable", point, str(step), "train", *args, *told]
        command += [] if n == 1 else ["--process", str(i)]
        with (logs / f"{i}.out").open("w") as out, (logs / f"{i}.err").open("w") as err:
            started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err, text=True))
    return started


def codes(started: Sequence[subprocess.Popen[str]], seconds: float = LIMIT) -> list[int]:
    """Exit statuses; those that do not end are killed and raise."""
    try:
        return [p.wait(seconds) for p in started]
    finally:
        for p in started:
            p.kill()


def run(n: int, args: Sequence[str], *, devices: int, logs: Path) -> None:
    got = codes(start(n, args, devices=devices, logs=logs))
    assert got == [0] * n, "\n".join(f"process {i}: {c}: {(logs / f'{i}.err').read_text()[-2000:]}" for i, c in enumerate(got))
