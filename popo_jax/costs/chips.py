"""What a TPU chip can do at most, by the maker's public figures. Knows no jax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from popo_jax.types import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    name: str
    hbm_bytes: float
    """That a program may use: the compiler keeps a little of the whole."""
    flops: float
    """A second, bfloat16."""
    hbm_speed: float
    """Bytes a second."""
    link_speed: float
    """Bytes a second out of a chip over all its links to others."""


CHIPS: Mapping[str, Chip] = {
    "v4": Chip("v4", 30.75 * GIB, 275e12, 1228e9, 300e9),
    "v5e": Chip("v5e", 15.75 * GIB, 197e12, 819e9, 200e9),
    "v5p": Chip("v5p", 95.74 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Chip("v6e", 31.25 * GIB, 918e12, 1640e9, 448e9),
}


def chip(topology: str) -> Chip:
    """Of a topology like v5p:4x4x8. Errors: UserError."""
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not all(n.isdigit() for n in shape.split("x")):
        raise UserError(f"--topology must be a chip ({', '.join(CHIPS)}), a colon and a shape, like v5p:4x4x8, got {topology}")
    return CHIPS[kind]
