"""The processes of one run: who they are, and what they tell each other on the host.

Messages go through jax.distributed's key-value store, never through a collective on the devices: those must start in the same
order everywhere, and a run starts programs from two threads.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

from popo_jax.runtime.signals import stop_wish
from popo_jax.runtime.supervise import LOST
from popo_jax.types import UserError

T = TypeVar("T")

HEARTBEAT_SECONDS = 25
"""A process not heard of for so long is lost, and the others end."""
PARTING_SECONDS = 10
"""A process that leaves on an error waits so long for others that leave on the same."""
BAD_INPUT = 2
"""Exit status, as the command line's."""
PATIENCE_SECONDS = 3600
"""A living process may keep the others waiting for so long."""


class LostPeer(UserError):
    """Another process of the run ended, or does not answer."""


@dataclass(frozen=True)
class Place:
    """Where a process stands, if it is told: "host:port" of process 0, how many there are, and which this is."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


class Peers:
    """All processes call the same methods in the same order on a channel; each channel belongs to one thread at a time."""

    def __init__(self, index: int = 0, count: int = 1, client: Any = None):
        self.index, self.count, self._client = index, count, client
        self._rounds: dict[str, int] = {}

    def tell(self, channel: str, value: T) -> list[T]:
        """Every process's value, by number. Errors: LostPeer if one never tells."""
        if self.count == 1:
            return [value]
        n = self._rounds[channel] = self._rounds.get(channel, 0) + 1
        folder = f"popo/{channel}/{n}/"
        try:
            self._client.key_value_set_bytes(f"{folder}{self.index}", pickle.dumps(value))
            self._client.wait_at_barrier(f"popo/{channel}/{n}", PATIENCE_SECONDS * 1000)
            told = dict(self._client.key_value_dir_get_bytes(folder))
            if n > 1:  # all have read it: they are here
                self._client.key_value_delete(f"popo/{channel}/{n - 1}/{self.index}")
        except jax.errors.JaxRuntimeError as e:
            raise LostPeer(f"another of the run's {self.count} processes was lost ({_first_line(e)})") from e
        return [pickle.loads(told[f"{folder}{i}"]) for i in range(self.count)]

    def shared(self, channel: str, n: int, work: Callable[[range], Sequence[T]]) -> list[T]:
        """`work(range(n))`, of which each process does a part: as many results as numbers, in order.

        Errors: a UserError of one process is raised in all.
        """
        part = range(n * self.index // self.count, n * (self.index + 1) // self.count)
        return [x for results in self._all(channel, lambda: list(work(part)) if part else []) for x in results]

    def first(self, channel: str, work: Callable[[], T]) -> T:
        """What `work` gives on process 0, on all; the others wait. Errors: its UserError is raised in all."""
        return self._all(channel, work if self.index == 0 else lambda: None)[0]  # type: ignore[arg-type,return-value]

    def same(self, channel: str, facts: Mapping[str, str]) -> None:
        """Errors: UserError naming the first of `facts` that differs between processes."""
        told = self.tell(channel, dict(facts))
        for name, mine in told[0].items():
            other = next((i for i, t in enumerate(told) if t.get(name) != mine), None)
            if other is not None:
                raise UserError(
                    f"all processes of a run must have the same {name}, got {mine} on process 0 and "
                    f"{told[other].get(name)} on process {other}"
                )

    def part(self) -> None:
        """Before leaving on an error that all may have: process 0, with whom jax's service goes, leaves last."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.wait_at_barrier("popo/leaving", PARTING_SECONDS * 1000)
        time.sleep(1.0 if self.index == 0 else 0.0)

    def _all(self, channel: str, work: Callable[[], T]) -> list[T]:
        try:
            mine: tuple[T | None, str | None] = (work(), None)
        except UserError as e:
            mine = (None, str(e))
        told = self.tell(channel, mine)
        failed = next((sentence for _, sentence in told if sentence is not None), None)
        if failed is not None:
            raise UserError(failed)
        return [value for value, _ in told]  # type: ignore[misc]


def leaving_together(place: Place, work: Callable[[Peers], object]) -> int:
    """`work` as one of several processes, SIGTERM taken as a wish from now on. Returns 0.

    A failure ends this process without jax's wait for the others; what they say of it themselves, they may say first.
    """
    with stop_wish():
        peers = connect(place)
        try:
            work(peers)
        except BaseException as e:
            if peers.count == 1:
                raise
            code, sentence = _told(e, peers)
            print(f"error: {sentence}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            if code == BAD_INPUT:
                peers.part()
            os._exit(code)
    return 0


def _told(e: BaseException, peers: Peers) -> tuple[int, str]:
    """(exit status, sentence); a traceback besides where it is a bug."""
    if isinstance(e, (LostPeer, jax.errors.JaxRuntimeError)):
        return LOST, (
            f"process {peers.index} of {peers.count} cannot go on without the others ({_first_line(e)}); checkpoints "
            f"committed before are whole: start all processes again with popo train --resume RUN"
        )
    if isinstance(e, UserError):
        return BAD_INPUT, str(e)
    if isinstance(e, OSError) and e.errno is not None and e.filename is not None:
        return BAD_INPUT, f"{e.filename}: {os.strerror(e.errno).lower()}; what was saved before is whole"
    if isinstance(e, KeyboardInterrupt):
        return 130, "interrupted; what was saved before is whole"
    traceback.print_exception(e)
    return 1, f"process {peers.index} of {peers.count} failed: {_first_line(e)}"


def connect(place: Place) -> Peers:
    """Join the run's processes, as `place` says, else as SLURM, Cloud TPU or Open MPI do. Call before the first computation.

    Errors: UserError for a place that is told in part, or processes that do not come.
    """
    _check(place)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from `stop_wish`
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=2 * HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as e:
        if place == Place() and "should be defined" in str(e):  # nothing told, no cluster found: a machine by itself
            return Peers()
        raise UserError(f"the processes of the run must find each other, got {_first_line(e)} ({place})") from e
    from jax._src.distributed import global_state  # jax offers no other way to its key-value store

    return Peers(jax.process_index(), jax.process_count(), global_state.client)


def _check(place: Place) -> None:
    told = (place.coordinator, place.processes, place.process)
    if told == (None, None, None):
        return
    if place.coordinator is None or place.processes is None or place.process is None:
        raise UserError(f"--coordinator, --processes and --process go together, got {told}")
    host, _, port = place.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator must be HOST:PORT of process 0, got {place.coordinator}")
    if not 0 <= place.process < place.processes:
        raise UserError(f"--process must be from 0 to {place.processes - 1} (--processes {place.processes}), got {place.process}")


def _first_line(e: BaseException) -> str:
    lines = str(e).strip().splitlines()
    return lines[0][:200] if lines else type(e).__name__
