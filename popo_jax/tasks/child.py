"""The parent's side of one verifier process: starts it, speaks with it without ever waiting for it, ends it for certain."""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from popo_jax.tasks.worker import HEAD, OUT_OF_MEMORY, frame

MAX_ANSWER = 65536
"""Bytes of an answer; more is nonsense."""


class Gone(Exception):
    """The worker's end of the connection is closed, or speaks another language."""


class Child:
    """A worker and what it has been asked."""

    def __init__(self, settings: Mapping[str, Any]):
        self.socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "popo_jax.tasks.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a verifier prints goes where errors go
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # one signal ends all it starts, and Ctrl-C is this process's to handle
                env=_environment(),
            )
        self.socket.setblocking(False)
        self.ready = False
        self.answered = 0
        self.waiting: deque[int] = deque()
        """Jobs handed over and not yet answered, in order."""
        self.since = time.monotonic()
        """When the first of them began."""
        self._out = bytearray(frame(0, pickle.dumps(dict(settings))))
        self._in = bytearray()

    @property
    def events(self) -> int:
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)

    def hand(self, jobs: Sequence[tuple[int, bytes]]) -> None:
        self.waiting.extend(i for i, _ in jobs)
        self._out += b"".join(frame(i, payload) for i, payload in jobs)
        self.since = time.monotonic()

    def answers(self, number: int) -> bool:
        """Takes note that job `number` is answered; False if it was not its turn."""
        if not self.waiting or self.waiting[0] != number:
            return False
        self.waiting.popleft()
        self.answered += 1
        self.since = time.monotonic()
        return True

    def exchange(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Sends what can be sent; (number, answer) of what has come. Errors: Gone."""
        with contextlib.suppress(BlockingIOError, ConnectionError):  # what it still said is read before it counts as gone
            while self._out:
                del self._out[: self.socket.send(self._out)]
        gone = False
        with contextlib.suppress(BlockingIOError):
            while not gone:
                try:
                    data = self.socket.recv(65536)
                except ConnectionError:
                    data = b""
                self._in += data
                gone = not data
        yield from self._answers()
        if gone:
            raise Gone

    def _answers(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        while len(self._in) >= HEAD.size:
            length, number = HEAD.unpack_from(self._in)
            if length > MAX_ANSWER:
                raise Gone
            end = HEAD.size + length
            if len(self._in) < end:
                return
            payload = bytes(self._in[HEAD.size : end])
            del self._in[:end]
            try:
                answer = pickle.loads(payload)
            except Exception as e:
                raise Gone from e
            yield number, answer

    def exited(self) -> bool:
        """Whether the process has ended. It is not waited for yet, so its number, and its group's, stay its own."""
        if not hasattr(os, "waitid"):
            return self._process.poll() is not None
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def end(self) -> str:
        """Kills the process and all it started, waits for it, and says how it ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.socket.close()
        code = self._process.returncode
        if code == OUT_OF_MEMORY:
            return "memory"
        return f"worker exited (code {code})" if code >= 0 else f"worker exited (signal {-code})"


def _environment() -> dict[str, str]:
    """This process's, with its import path and the current directory; one thread each, no device, the same hashes in all."""
    root = str(Path(__file__).resolve().parents[2])
    path = [os.path.abspath(p) for p in [*sys.path, os.getcwd(), root] if p != ""]
    fixed = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)), **fixed}
