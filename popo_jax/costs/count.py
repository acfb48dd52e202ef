"""What a compiled program does on each device: FLOPs, bytes through memory, collectives. Loops count as often as they run.

`cost_analysis()` counts a loop's body once and sees nothing of a Pallas kernel; here trip counts are read from the loops'
conditions, and kernels are counted from the shapes of what they are given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from popo_jax.costs.hlo import Array, Computation, Instruction, Module

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota"}
"""Move nothing."""
HOST = ("infeed", "outfeed", "send", "recv")
COUNTED = {
    *("add", "subtract", "multiply", "divide", "maximum", "minimum", "negate", "abs", "compare", "and", "or", "xor", "not"),
    *("floor", "ceil", "sign", "remainder", "clamp", "round-nearest-even", "round-nearest-afz", "power", "select", "convert"),
}
"""One operation for each element."""
_DIMS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")


@dataclass(frozen=True)
class Collective:
    kind: str
    bytes: float
    """Of the whole that is gathered, reduced or exchanged in one call, on one device."""
    group: int
    """Devices that take part together."""
    times: float
    source: str


@dataclass
class Count:
    """Of one device."""

    matmul: float = 0.0
    """FLOPs of products of matrices that XLA makes."""
    kernels: float = 0.0
    """FLOPs of Pallas kernels."""
    elementwise: float = 0.0
    bytes: float = 0.0
    """Read and written by fused operations: through HBM, but for what the compiler keeps in VMEM."""
    collectives: list[Collective] = field(default_factory=list)
    host: list[str] = field(default_factory=list)
    """Transfers to or from the host within the program."""
    unknown: list[str] = field(default_factory=list)
    """Kernels whose FLOPs are not known."""

    @property
    def flops(self) -> float:
        return self.matmul + self.kernels + self.elementwise

    def add(self, other: Count, times: float = 1.0) -> None:
        self.matmul += times * other.matmul
        self.kernels += times * other.kernels
        self.elementwise += times * other.elementwise
        self.bytes += times * other.bytes
        self.collectives += [Collective(c.kind, c.bytes, c.group, c.times * times, c.source) for c in other.collectives]
        self.host += other.host
        self.unknown += other.unknown


Trips = Callable[[Instruction], float]
Kernel = Callable[[Instruction, list[Array]], float | None]


def count(module: Module, *, trips: Trips, kernel: Kernel) -> Count:
    """Everything the entry computation does.

    trips: how often a loop runs whose condition compares with data; `kernel`: FLOPs of a Pallas call, by its instruction and
    operands. Of a conditional's branches the most expensive counts.
    """
    return _Counter(module, trips, kernel).of(module.entry)


class _Counter:
    def __init__(self, module: Module, trips: Trips, kernel: Kernel):
        self._module, self._trips, self._kernel = module, trips, kernel
        self._known: dict[tuple[str, bool], Count] = {}

    def of(self, name: str, *, fused: bool = False) -> Count:
        """fused: what it moves counts where the fusion is called."""
        if (name, fused) not in self._known:
            computation, total = self._module.computations[name], Count()
            for i in computation.instructions.values():
                total.add(self._one(i, computation, fused))
            self._known[name, fused] = total
        return self._known[name, fused]

    def _one(self, i: Instruction, within: Computation, fused: bool) -> Count:
        out = Count()
        if i.op == "while":
            known = trip_count(i, within, self._module)
            out.add(self.of(i.called("body") or ""), self._trips(i) if known is None else known)
            return out
        if i.op == "conditional":
            names = i.listed("branch_computations") or [i.called(k) or "" for k in ("true_computation", "false_computation")]
            out.add(max((self.of(n) for n in names), key=lambda c: (c.flops, c.bytes)))
            return out
        if i.op in ("fusion", "call", "async-start"):
            inner = i.called("calls") or i.called("to_apply")
            if inner is not None:
                out.add(self.of(inner, fused=fused or i.op == "fusion"))
        elif i.op in FREE or i.op.endswith(("-done", "-update")):
            return out
        operands = [a for name in i.operands if name in within.instructions for a in within.instructions[name].results]
        self._work(i, operands, within, out)
        if not fused and i.op not in ("call", "async-start"):
            out.bytes += self._moved(i, within)
        return out

    def _work(self, i: Instruction, operands: list[Array], within: Computation, out: Count) -> None:
        kind = i.op.removesuffix("-start")
        if i.op == "convolution":
            out.matmul += convolution_flops(i, operands)
        elif i.op == "dot":
            out.matmul += dot_flops(i, operands)
        elif i.op == "custom-call" and "tpu_custom_call" in i.attributes:
            flops = self._kernel(i, operands)
            out.kernels += flops or 0.0
            out.unknown += [i.name] if flops is None else []
        elif i.op in COUNTED:
            out.elementwise += i.results[0].size
        elif i.op in ("reduce", "reduce-window"):
            out.elementwise += operands[0].size if operands else 0
        elif kind in COLLECTIVES:
            kind = "reduce-scatter" if within.name.startswith("all-reduce-scatter") else kind  # how TPUs write one
            given = sum(a.bytes for a in operands)
            whole = max(given, i.bytes - (given if i.op.endswith("-start") else 0))  # which names what it was given as well
            out.collectives.append(Collective(kind, whole, group_size(i.attributes), 1.0, i.source))
        elif kind in HOST or (i.op == "custom-call" and "callback" in i.attributes):
            out.host.append(i.name)

    def _moved(self, i: Instruction, within: Computation) -> float:
        """Bytes of operands read and results written; of what is only sliced or updated in place, the part."""
        inner = self._module.computations.get(i.called("calls") or "") if i.op == "fusion" else None
        known = [within.instructions[name] for name in i.operands if name in within.instructions]
        if i.op.endswith("-start") or (i.op == "custom-call" and "tpu_custom_call" not in i.attributes):
            return 0.0  # fetched ahead of its use, which counts
        if i.op in ("dynamic-slice", "gather"):
            return 2 * i.bytes
        if i.op == "dynamic-update-slice":
            return 2 * known[1].bytes if len(known) > 1 else i.bytes
        if inner is None:
            return i.bytes + sum(k.bytes for k in known)
        read = sum(_read(p, inner, k.bytes) for p, k in zip(inner.parameters, known, strict=False))
        return read + _written(inner, i.bytes)


def _read(parameter: Instruction, inner: Computation, whole: float) -> float:
    users = inner.users.get(parameter.name, [])
    if users and all(u.op in ("dynamic-slice", "gather") and u.operands[0] == parameter.name for u in users):
        return sum(u.bytes for u in users)
    if users and all(u.op == "dynamic-update-slice" and u.operands[0] == parameter.name for u in users):
        return 0.0
    return whole


def _written(inner: Computation, whole: float) -> float:
    roots = [inner.root]
    if inner.root.op == "tuple":
        roots = [inner.instructions[name] for name in inner.root.operands]
    while any(r.op == "bitcast" for r in roots):
        roots = [inner.instructions[r.operands[0]] if r.op == "bitcast" else r for r in roots]
    if all(r.op != "dynamic-update-slice" for r in roots):
        return whole
    return sum(inner.instructions[r.operands[1]].bytes if r.op == "dynamic-update-slice" else r.bytes for r in roots)


def trip_count(loop: Instruction, within: Computation, module: Module) -> int | None:
    """Of a loop that counts up to a constant by a constant; None where it compares with data, or with more than that."""
    condition, body = (module.computations[loop.called(key) or ""] for key in ("condition", "body"))
    test = condition.root
    if test.op != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, bound = (condition.instructions[name] for name in test.operands)
    place = re.search(r"index=(\d+)", counter.attributes) if counter.op == "get-tuple-element" else None
    if place is None or bound.op != "constant" or body.root.op != "tuple":
        return None
    step = _constant(body.instructions[body.root.operands[int(place[1])]], body)
    given = within.instructions[loop.operands[0]]
    first = _constant(within.instructions[given.operands[int(place[1])]], within) if given.op == "tuple" else None
    return -(-(int(bound.arguments) - (first or 0)) // (step or 1))


def _constant(i: Instruction, within: Computation) -> int | None:
    """The value of a constant behind copies, or what is added to a counter."""
    if i.op == "constant":
        return int(i.arguments)
    if i.op in ("copy", "bitcast"):
        return _constant(within.instructions[i.operands[0]], within)
    if i.op == "add":
        return next((v for name in i.operands if (v := _constant(within.instructions[name], within)) is not None), None)
    return None


def dot_flops(i: Instruction, operands: Sequence[Array]) -> float:
    """2 x results x the contracted size."""
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
    contracted = math.prod(operands[0].shape[int(d)] for d in found[1].split(",") if d) if found else 1
    return 2.0 * i.results[0].size * contracted


def convolution_flops(i: Instruction, operands: Sequence[Array]) -> float:
    """2 x pairs of (result, weight) that meet, as XLA's HloCostAnalysis counts them: TPUs write products as convolutions, with
    batch dimensions as spatial ones, most of whose window is padding."""
    found = _DIMS.search(i.attributes)
    assert found is not None, i.attributes[:200]
    lhs, rhs, out = found.groups()
    window = dict(part.split("=") for part in (_WINDOW.search(i.attributes) or ["", ""])[1].split())
    spatial = [c for c in out if c.isdigit()]
    pairs = 1
    for n in spatial:
        pairs *= _pairs(
            int(n), operands[0].shape[lhs.index(n)], operands[1].shape[rhs.index(n)], i.results[0].shape[out.index(n)], window
        )
    per_pair = operands[1].shape[rhs.index("i")]
    batch, features = i.results[0].shape[out.index("b")], i.results[0].shape[out.index("f")]
    return 2.0 * pairs * per_pair * batch * features


def _pairs(n: int, size: int, window_size: int, out: int, window: dict[str, str]) -> int:
    """(result, window) positions along spatial dimension n that fall on an element and not on padding or a hole."""

    def at(key: str, default: int) -> int:
        return int(window[key].split("x")[n]) if key in window else default

    stride, dilation, holes = at("stride", 1), at("rhs_dilate", 1), at("lhs_dilate", 1)
    low = int(window["pad"].split("x")[n].split("_")[0]) if "pad" in window else 0
    length = (size - 1) * holes + 1
    place = np.arange(out)[:, None] * stride + np.arange(window_size) * dilation - low
    return int(((place >= 0) & (place < length) & (place % holes == 0)).sum())


def group_size(attributes: str) -> int:
    """Devices of one group in any of HLO's three spellings; 2 for a permutation, 0 for all of them."""
    if "source_target_pairs" in attributes:
        return 2
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    return 0
