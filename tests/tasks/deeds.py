"""Verifiers that misbehave, for workers to run: the response names the deed."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from popo_jax.tasks import mathematics
from popo_jax.types import Verdict


def forever() -> None:
    while True:
        pass


def stubborn() -> None:
    """Takes no hint."""
    for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            continue
    while True:
        try:
            forever()
        except BaseException:
            continue


def bignum() -> None:
    """Lets no other thread run."""
    9 ** (9**9)


def regex() -> None:
    re.match(r"(a+)+$", "a" * 64 + "b")


def memory() -> None:
    held = []
    while True:
        held.append(bytearray(1 << 24))


def quiet_memory() -> None:
    """Goes on when there is none left."""
    held = []
    try:
        while True:
            held.append(bytearray(1 << 20))
    except MemoryError:
        while True:
            held.append([0] * 10)


def orphan() -> None:
    """Leaves a child that holds the worker's connection."""
    if os.fork() == 0:
        time.sleep(60)
    os._exit(4)


def deed(response: str, **fields: Any) -> Any:
    """Right unless it is a deed."""
    name, _, rest = response.partition(" ")
    if "log" in fields:
        with Path(fields["log"]).open("a") as f:
            f.write(f"{os.getpid()} {response[:200]!a}\n")
    match name:
        case "forever" | "stubborn" | "bignum" | "regex" | "memory" | "quiet_memory" | "orphan":
            globals()[name]()
        case "sleep":
            time.sleep(float(rest))
        case "exit":
            os._exit(int(rest))
        case "sys.exit":
            sys.exit(5)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "segfault":
            ctypes.string_at(0)
        case "child":
            Path(rest or os.devnull).write_text(str(subprocess.Popen(["sleep", "60"]).pid))
            forever()
        case "raise":
            raise ValueError(rest)
        case "print":
            print("printed " * 1000, flush=True)
            os.write(1, b"\x00\x00\x00\x01\x00\x00\x00\x00written")
        case "once":  # exits unless it was here before
            mark = Path(rest)
            if not mark.exists():
                mark.touch()
                os._exit(6)
    return Verdict(1.0, 1.0, f"{len(response)}")


def short(response: str, **fields: Any) -> Any:
    """Answers that stand for a verdict, and some that do not."""
    return {"0.5": 0.5, "True": True, "0": 0, "pair": (-2.0, 1), "half": (3, 0.5), "two": 2.0, "text": "1", "None": None}[
        response
    ]


def case(response: str, *, kind: str, expected: Any = None, **options: Any) -> Any:
    """A case of math-verify's tests."""
    if kind == "grade":
        return mathematics.grade(response, **options)
    import math_verify

    config = math_verify.StringExtractionConfig(
        strings=tuple(options["strings"]),
        lowercase=options["lowercase"],
        try_extract_without_anchor=not options["anchored"],
    )
    found = math_verify.parse(response, [config], parsing_timeout=None)
    return float(found == expected)


def direct(response: str, *, answer: str) -> Any:
    """What math-verify says, called as its own tests call it."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    how = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return float(verify(parse(answer, how), parse(response, how)))


not_a_function = 3
