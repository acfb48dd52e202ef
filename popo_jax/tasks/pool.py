"""Runs verifiers over the responses of a step. Whatever a verifier does, every response gets a verdict, in order, in time.

Those bounded by construction run in this process (`grade_all`). Others, mathematics and a user's own, run in worker
processes that are killed at a limit of time or memory (`Pool`).
"""

from __future__ import annotations

import os
import pickle
import selectors
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from popo_jax.tasks import get_task
from popo_jax.tasks.child import Child, Gone
from popo_jax.tasks.verdicts import check_verdict, judge, raised
from popo_jax.types import UserError, Verdict

Job = tuple[str, str, Mapping[str, Any]]
"""Task name, response text, keyword fields of the task's `grade`."""

CHUNK = 32
"""Jobs handed to a worker at once; those it has not begun when it is killed go to others."""
START_SECONDS = 120.0
"""A worker imports its verifiers in that time."""
MAX_STARTS = 3
"""Workers in a row that may end before they are ready."""
TICK = 0.25
"""Seconds between two looks for workers whose end their connection does not tell (a child of theirs holds it)."""

__all__ = ["Job", "Pool", "check_verdict", "grade_all"]


def grade_all(jobs: Sequence[Job]) -> list[Verdict]:
    """Verdicts of all jobs, in order, in this process. A verifier that raises, or answers nonsense, gives NaN and the reason.

    Errors: UserError for an unknown task.
    """
    graders: dict[str, Callable[..., Any]] = {name: get_task(name).grade for name in {task for task, _, _ in jobs}}
    return [judge(graders[task], response, fields) for task, response, fields in jobs]


class Pool:
    """Worker processes for `verifiers` (task name -> "module:function"), kept between calls.

    A response whose verifier takes longer than `seconds` of wall-clock time, runs out of `memory_gb` of address space, or
    ends its process, is graded once more by a fresh worker; then it has score 0, correct 0 and the reason: "timeout",
    "memory", "worker exited (code 3)". An exception gives NaN and "verifier error: ...". Calls from several threads wait
    for each other. `workers` None: one a core.
    """

    def __init__(self, verifiers: Mapping[str, str], *, workers: int | None = None, seconds: float = 5.0, memory_gb: float = 2.0):
        self._settings: dict[str, Any] = {"verifiers": dict(verifiers), "seconds": seconds, "memory": int(memory_gb * 2**30)}
        self._most = workers if workers is not None else cores()
        self._seconds = seconds
        self._children: list[Child] = []
        self._failed_starts = 0
        self._closed = False
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _end, self._children, os.getpid())  # at exit, too

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; a call under way in another thread raises."""
        self._closed = True
        with self._lock:
            self._finalizer()

    def start(self) -> None:
        """Starts all workers and waits for the first. Errors: UserError if a verifier cannot be imported."""
        with self._lock:
            self._spawn(self._most)
            while not any(child.ready for child in self._children):
                self._listen(None)

    def __call__(self, jobs: Sequence[Job]) -> list[Verdict]:
        """Verdicts of all jobs, in order. Errors: UserError if a verifier cannot be imported, or no worker starts."""
        with self._lock:
            batch = _Batch(jobs, min(self._most, max(len(jobs), 1)))
            try:
                while batch.open:
                    self._spawn(batch.workers)
                    for child in self._children:
                        if child.ready and not child.waiting:
                            child.hand(batch.take(fresh=child.answered == 0))
                    self._listen(batch)
            except BaseException:
                for child in [c for c in self._children if c.waiting]:
                    self._drop(child)
                raise
            return batch.verdicts  # type: ignore[return-value]  # none is open

    def _spawn(self, workers: int) -> None:
        if self._closed:
            raise RuntimeError("the pool of verifiers is closed")
        while len(self._children) < workers:  # a worker that ends is replaced at once: there is always a fresh one to come
            self._children.append(Child(self._settings))

    def _listen(self, batch: _Batch | None) -> None:
        """Waits until something happens, at most a tick; takes answers in, and replaces workers that ended or are too slow.

        Time is taken before the wait: an answer that came while this process was held up is read before it counts as late.
        """
        now = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for child in self._children:
                selector.register(child.socket, child.events, child)
            heard = selector.select(max(0.0, min([TICK, *(self._deadline(c) - now for c in self._children)])))
        for key, _ in heard:
            self._exchange(key.data, batch)
        for child in list(self._children):
            if child.exited():
                self._exchange(child, batch)
                self._lose(child, None, batch)
            elif now > self._deadline(child):
                self._lose(child, "timeout", batch)

    def _deadline(self, child: Child) -> float:
        return child.since + (START_SECONDS if not child.ready else self._seconds if child.waiting else float("inf"))

    def _exchange(self, child: Child, batch: _Batch | None) -> None:
        try:
            for number, answer in child.exchange():
                self._hear(child, number, answer, batch)
        except Gone:
            self._lose(child, None, batch)

    def _hear(self, child: Child, number: int, answer: tuple[Any, ...], batch: _Batch | None) -> None:
        if child not in self._children:  # lost by an answer before this one
            return
        match answer:
            case ("ready",):
                child.ready, self._failed_starts = True, 0
            case ("failed", sentence):
                self._drop(child)
                raise UserError(str(sentence))
            case ("verdict", float(score), float(correct), str(reason)) if batch and child.answers(number):
                batch.close(number, Verdict(score, correct, reason))
            case ("memory",) if child.waiting:
                self._lose(child, "memory", batch)
            case _:
                self._lose(child, "worker wrote nonsense", batch)

    def _lose(self, child: Child, reason: str | None, batch: _Batch | None) -> None:
        """Ends a worker; its first open job caused that, the others are free for other workers."""
        if child not in self._children:
            return
        ended = self._drop(child)
        if not child.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_STARTS:
                why = f"{reason or ended}; verifier.memory_gb is {self._settings['memory'] / 2**30:g}"
                raise UserError(f"the verifiers' workers must start, got {self._failed_starts} in a row that did not ({why})")
        elif child.waiting and batch is not None:
            batch.fail(child.waiting, reason or ended)
        self._children.append(Child(self._settings))  # fresh, for what failed

    def _drop(self, child: Child) -> str:
        self._children.remove(child)
        return child.end()


class _Batch:
    """The jobs of one call: to do, to do once more, done."""

    def __init__(self, jobs: Sequence[Job], workers: int):
        self.workers = workers
        self.verdicts: list[Verdict | None] = [None] * len(jobs)
        self.open = len(jobs)
        self._chunk = min(CHUNK, max(1, len(jobs) // (4 * workers)))
        self._payloads: dict[int, bytes] = {}
        self._todo: deque[int] = deque()
        self._again: deque[int] = deque()
        self._failed: set[int] = set()
        for i, (task, response, fields) in enumerate(jobs):
            try:
                self._payloads[i] = pickle.dumps((task, response, dict(fields)))
                self._todo.append(i)
            except Exception as e:
                self.close(i, raised(e))

    def take(self, *, fresh: bool) -> list[tuple[int, bytes]]:
        """What an idle worker does next: a fresh one a job that failed, by itself; else a chunk."""
        if fresh and self._again:
            chosen = [self._again.popleft()]
        else:
            chosen = [self._todo.popleft() for _ in range(min(self._chunk, len(self._todo)))]
        return [(i, self._payloads[i]) for i in chosen]

    def close(self, i: int, verdict: Verdict) -> None:
        self.verdicts[i] = verdict
        self._payloads.pop(i, None)
        self.open -= 1

    def fail(self, waiting: Sequence[int], reason: str) -> None:
        """The first of `waiting` made its worker fail, the rest were behind it."""
        culprit, *rest = waiting
        self._todo.extendleft(reversed(rest))
        if culprit in self._failed:
            self.close(culprit, Verdict(0.0, 0.0, reason))
        else:
            self._failed.add(culprit)
            self._again.append(culprit)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end(children: list[Child], owner: int) -> None:
    if os.getpid() == owner:  # a forked copy of this process leaves them alone
        while children:
            children.pop().end()
