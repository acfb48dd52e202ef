"""A compiled program's text (HLO) as computations of instructions. Knows no jax; sizes are those of one device."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

BYTES: Mapping[str, float] = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2", "f8e4m3b11fnuz"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
    **dict.fromkeys(("s4", "u4"), 0.5),
}
"""Of one element; what is not named (tokens, say) has none."""
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_COMMENT = re.compile(r"/\*.*?\*/")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(")


@dataclass(frozen=True)
class Array:
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        return self.size * BYTES.get(self.dtype, 0)


@dataclass(frozen=True)
class Instruction:
    name: str
    op: str
    results: tuple[Array, ...]
    """One, or those of a tuple, flat."""
    operands: tuple[str, ...]
    arguments: str
    """What stands between the parentheses, a constant's value say."""
    attributes: str
    root: bool

    @property
    def bytes(self) -> float:
        return sum(a.bytes for a in self.results)

    def called(self, key: str) -> str | None:
        """The computation that attribute `key` names."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    def listed(self, key: str) -> list[str]:
        """The computations of an attribute like branch_computations={%a, %b}."""
        found = re.search(rf"\b{key}=\{{([^}}]*)\}}", self.attributes)
        return [name.strip().lstrip("%") for name in found[1].split(",")] if found else []

    @cached_property
    def source(self) -> str:
        """The operation in the program that was traced: jit(train_step)/while/body/..."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: Mapping[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    @cached_property
    def parameters(self) -> list[Instruction]:
        """By number."""
        return sorted((i for i in self.instructions.values() if i.op == "parameter"), key=lambda i: int(i.arguments))

    @cached_property
    def users(self) -> Mapping[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {}
        for i in self.instructions.values():
            for name in dict.fromkeys(i.operands):
                found.setdefault(name, []).append(i)
        return found


@dataclass(frozen=True)
class Module:
    computations: Mapping[str, Computation]
    entry: str


@dataclass
class _Reader:
    name: str = ""
    lines: list[str] = field(default_factory=list)


def parse(text: str) -> Module:
    """Errors: ValueError for a text without an entry computation."""
    computations: dict[str, Computation] = {}
    entry, reader = None, _Reader()
    for line in text.splitlines():
        if reader.name:
            if line.rstrip() == "}":
                computations[reader.name] = _computation(reader)
                reader = _Reader()
            elif _INSTRUCTION.match(line):
                reader.lines.append(line)
            elif reader.lines:
                reader.lines[-1] += line  # an attribute of several lines
        elif (found := _HEADER.match(line)) and line.rstrip().endswith("{"):
            reader.name = found[2]
            entry = found[2] if found[1] else entry
    if entry is None:
        raise ValueError("HLO text must have an ENTRY computation, got none")
    return Module(computations, entry)


def _computation(reader: _Reader) -> Computation:
    instructions = [_instruction(_COMMENT.sub("", line)) for line in reader.lines]
    return Computation(reader.name, {i.name: i for i in instructions})


def _instruction(line: str) -> Instruction:
    head = _INSTRUCTION.match(line)
    assert head is not None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    results = tuple(Array(d, tuple(int(n) for n in dims.split(",") if n)) for d, dims in _ARRAY.findall(_unlaid(rest[:end])))
    call = rest[end:].lstrip()
    op, _, _ = call.partition("(")
    close = _closing(call, len(op))
    arguments, attributes = call[len(op) + 1 : close], call[close + 1 :]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(head[2], op, results, operands, arguments, attributes, head[1] is not None)


def _unlaid(shapes: str) -> str:
    """Without the layouts in braces."""
    return re.sub(r"\{[^{}]*\}", "", shapes)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] == "(":
            depth += 1
        elif text[i] == ")":
            depth -= 1
            if depth == 0:
                return i
    raise ValueError(f"HLO: a parenthesis never closes in {text[:200]}")
