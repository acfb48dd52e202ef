"""The verifiers of a run: each response goes to its task's, in this process or in the pool's workers."""

from __future__ import annotations

from collections.abc import Sequence

from popo_jax.config import Config
from popo_jax.task_config import UNBOUNDED
from popo_jax.tasks.pool import Job, Pool, grade_all
from popo_jax.types import Verdict


class Graders:
    """(task, response, answer fields) of many responses -> verdicts, in order. Owns the pool, if a task needs one.

    Errors: UserError at once if a user's verifier cannot be imported.
    """

    def __init__(self, c: Config):
        paths = {t.name: t.verifier or UNBOUNDED.get(t.name) for t in c.tasks}
        verifiers: dict[str, str] = {name: path for name, path in paths.items() if path is not None}
        v = c.verifier
        self._pooled = frozenset(verifiers)
        self._pool = Pool(verifiers, workers=v.workers, seconds=v.seconds, memory_gb=v.memory_gb) if verifiers else None
        if self._pool is not None:
            self._pool.start()

    def __call__(self, jobs: Sequence[Job]) -> list[Verdict]:
        sides: tuple[list[int], list[int]] = ([], [])
        for i, job in enumerate(jobs):
            sides[job[0] in self._pooled].append(i)
        here, there = ([jobs[i] for i in side] for side in sides)
        verdicts = grade_all(here) + (self._pool(there) if self._pool is not None and there else [])
        order = dict(zip(sides[0] + sides[1], verdicts, strict=True))
        return [order[i] for i in range(len(jobs))]

    def __enter__(self) -> Graders:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers."""
        if self._pool is not None:
            self._pool.close()
