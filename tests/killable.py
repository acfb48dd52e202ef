"""`popo train` with a verifier that needs no skill and, if asked, a SIGKILL at a named point. Run by the resume tests.

python -m tests.killable POINT STEP ARGS...   (POINT: never, mid-step, mid-save, before-commit, after-commit)
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import zlib
from typing import Any

from popo_jax import cli, journal, launch, train
from popo_jax.runtime import supervise
from popo_jax.runtime.checkpoints import Checkpoints
from popo_jax.types import Verdict


def luck(jobs: Any) -> list[Verdict]:
    """Right by a hash of prompt and text: every kind of group turns up, whatever the policy knows."""
    out = []
    for _, text, fields in jobs:
        right = float(zlib.crc32(f"{fields}{text}".encode()) % 3 == 0 and zlib.crc32(str(fields).encode()) % 3 != 0)
        out.append(Verdict(right, right, "luck"))
    return out


def lucky(c: Any) -> contextlib.AbstractContextManager[Any]:
    """In place of a run's graders."""
    return contextlib.nullcontext(luck)


def supervised(argv: Any, run: Any = supervise.run) -> int:
    """A child of several processes is patched like its parent."""
    return run([*sys.argv[1:3], *argv])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str, step: int) -> None:
    """Patch the real trainer so that it dies at `point` of step `step`."""
    real_store, real_row, real_save = train.store, journal.Journal.step, Checkpoints.save

    def store(parts: Any, rollout: Any, plan: Any, out: Any, order: Any, version: int) -> Any:
        if point == "mid-step" and version == step:
            die()
        return real_store(parts, rollout, plan, out, order, version)

    def row(self: Any, progress: Any, *rest: Any) -> None:
        real_row(self, progress, *rest)
        if point == "before-commit" and progress.step == step:
            die()

    def save(self: Any, at: int, **kw: Any) -> None:
        real_save(self, at, **kw)
        if at < step:
            self.wait()  # a step here takes milliseconds: let the saves before the chosen one be committed
        if at == step and point == "mid-save":
            die()
        if at == step and point == "after-commit":
            self.wait()
            die()

    train.store, journal.Journal.step, Checkpoints.save = store, row, save  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    supervise.MODULE, supervise.run = "tests.killable", supervised
    launch.Graders = lucky  # type: ignore[assignment]
    arm(sys.argv[1], int(sys.argv[2]))
    sys.exit(cli.main(sys.argv[3:]))
