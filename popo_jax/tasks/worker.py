"""A process that runs verifiers for a pool: `python -m popo_jax.tasks.worker FD`, FD one end of a socket pair.

A frame is length and number (two uint32), then a pickle. In: the settings, then jobs. Out: whether the verifiers could be
imported, then one answer a job, sent before the next job begins, so that a kill costs one job.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from popo_jax.tasks.verdicts import as_verdict, check_verdict, clean, message, raised

HEAD = struct.Struct("!II")
READY, FAILED, MEMORY, VERDICT = "ready", "failed", "memory", "verdict"
"""What an answer is."""
OUT_OF_MEMORY = 86
"""Exit code of a worker that has no memory left to answer."""
ORPHAN_SECONDS = 60
"""Processor time of one job beyond its limit, after which the system ends a worker whose parent is gone."""


def main(fd: int) -> None:
    with socket.socket(fileno=fd) as connection:
        frames = read(connection)
        _, payload = next(frames)
        settings = pickle.loads(payload)
        limit_memory(settings["memory"])
        threading.Thread(target=watch, args=(fd,), daemon=True).start()
        graders, complaint = load(settings["verifiers"])
        write(connection, 0, (FAILED, complaint) if complaint else (READY,))
        for number, payload in frames:
            limit_cpu(settings["seconds"])
            write(connection, number, answer(graders, payload))


def answer(graders: Mapping[str, Callable[..., Any]], payload: bytes) -> tuple[Any, ...]:
    try:
        task, response, fields = pickle.loads(payload)
        v = check_verdict(as_verdict(graders[task](response, **fields)))
    except MemoryError:
        return (MEMORY,)
    except Exception as e:
        v = raised(e)
    return VERDICT, v.score, v.correct, clean(v.reason)


def load(verifiers: Mapping[str, str]) -> tuple[dict[str, Callable[..., Any]], str]:
    """Task -> its function, and a sentence if one of the "module:function" paths leads nowhere."""
    graders = {}
    for task, path in verifiers.items():
        module, _, name = path.partition(":")
        try:
            graders[task] = getattr(importlib.import_module(module), name)
        except MemoryError:
            raise
        except BaseException as e:  # a module that calls sys.exit, too
            return {}, f"the verifier of task {task} ({path}) cannot be imported: {type(e).__name__}: {message(e)}"
        if not callable(graders[task]):
            return {}, f"the verifier of task {task} ({path}) must be a function, got {type(graders[task]).__name__}"
    return graders, ""


def read(connection: socket.socket) -> Iterator[tuple[int, bytes]]:
    """(number, payload) of every frame until the other end closes."""
    with connection.makefile("rb") as stream:
        while len(head := stream.read(HEAD.size)) == HEAD.size:
            length, number = HEAD.unpack(head)
            payload = stream.read(length)
            if len(payload) < length:
                return
            yield number, payload


def frame(number: int, payload: bytes) -> bytes:
    return HEAD.pack(len(payload), number) + payload


def write(connection: socket.socket, number: int, message: tuple[Any, ...]) -> None:
    connection.sendall(frame(number, pickle.dumps(message)))


def limit_memory(size: int) -> None:
    """Of the address space, in bytes. Not every system has it."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def limit_cpu(seconds: float) -> None:
    """The parent keeps the time; this one ends a worker that outlives it in a computation that lets no thread run."""
    with contextlib.suppress(ValueError, OSError):
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(used + seconds) + ORPHAN_SECONDS, hard))


def watch(fd: int) -> None:
    """Ends this process, and what it started, when the parent is gone."""
    poll = select.poll()
    poll.register(fd, 0)  # hang-ups are always reported
    while not any(event & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, event in poll.poll()):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
