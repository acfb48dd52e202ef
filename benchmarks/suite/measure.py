"""How a case is measured: compiled apart, then rounds, in each of which the machine's peak is measured as well."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.suite.load import Load
from benchmarks.suite.sizes import Size
from popo_jax.models.linear import precision

LEAST, MOST = 5, 40
"""Rounds of a case."""


@dataclass(frozen=True)
class Timed:
    """`run(*prepare())`, of which only `run` is timed, until its arrays are there."""

    run: Callable[..., Any]
    prepare: Callable[[], tuple] = tuple


@dataclass(frozen=True)
class Program:
    """A compiled function, what that took, and the memory it needs besides arguments and results."""

    call: Callable[..., Any]
    compile_s: float
    """Tracing, lowering and compiling."""
    temp_bytes: int | None


@dataclass(frozen=True)
class Peak:
    """Best of the rounds: rates that a program can be held against."""

    flops_per_s: float
    """2 N^3 of a product of square matrices, in the computation's precision."""
    bytes_per_s: float
    """Read and written."""


@dataclass(frozen=True)
class Measured:
    seconds: Mapping[str, list[float]]
    first: Mapping[str, float]
    """Seconds of the first round, which is in no statistic."""
    peak: Peak | None = None
    others: float | None = None
    """Cores that other processes kept busy meanwhile."""


def compiled(jitted: Any, *args: Any, **static: Any) -> Program:
    """`jitted.lower(...).compile()`; `args` may be ShapeDtypeStructs."""
    began = time.perf_counter()
    program = jitted.lower(*args, **static).compile()
    took = time.perf_counter() - began
    memory = program.memory_analysis()
    return Program(program, took, None if memory is None else int(memory.temp_size_in_bytes))


def rounds(parts: Mapping[str, Timed], *, seconds: float, least: int = LEAST, most: int = MOST) -> Measured:
    """Seconds of each part, all of them once a round, for `seconds` (between `least` and `most` rounds)."""
    first = {name: once(part) for name, part in parts.items()}
    kept: dict[str, list[float]] = {name: [] for name in parts}
    load, began, n = Load(), time.perf_counter(), 0
    while n < least or (n < most and time.perf_counter() - began < seconds):
        for name, part in parts.items():
            kept[name].append(once(part))
        n += 1
    return Measured(kept, first, others=load.others())


def once(part: Timed) -> float:
    args = jax.block_until_ready(part.prepare())
    began = time.perf_counter()
    jax.block_until_ready(part.run(*args))
    return time.perf_counter() - began


def beside_peak(parts: Mapping[str, Timed], size: Size) -> Measured:
    """`rounds` of the parts, with the machine's peak measured in between."""
    dtype = jnp.dtype(size.sample.model.dtype)
    n = size.copied // 4
    square = jax.random.normal(jax.random.key(0), (size.side, size.side), dtype)
    product = jax.jit(lambda x: jnp.dot(x, x, precision=precision(x)))
    line, copy = jnp.zeros(n, jnp.float32), jax.jit(lambda x: x + 1)
    peaks = {"product": Timed(lambda: product(square)), "copy": Timed(lambda: copy(line))}
    got = rounds(dict(parts) | peaks, seconds=size.seconds)
    peak = Peak(2 * size.side**3 / min(got.seconds["product"]), 2 * size.copied / min(got.seconds["copy"]))
    return dataclasses.replace(got, peak=peak)
