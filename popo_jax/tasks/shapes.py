"""The figures of drawn geometry problems: their lines, where labels stand, which values they take, the steps to x.

A family is a kind of figure with x at one of its places; the values of its labels are all that varies. Everything lies on
7 x 7 cells: points are (x to the right, y down) from the upper left corner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

SIDE = 7
"""Cells of the image's side."""
MAX_VALUE = 99
"""Of the numbers that are drawn from; a label has at most twice that."""

Point = tuple[float, float]
Place = tuple[int, int]
"""Column and row of the cell where a label begins."""
Values = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """One of a kind's figures, x at one place."""

    lines: tuple[tuple[Point, ...], ...]
    places: tuple[Place, ...]
    """Of the labels, that of x last."""
    labels: Callable[[Values], Values]
    """What stands at all places but the last."""
    work: Callable[[Values], tuple[str, ...]]
    """Steps to the answer from the labels; "_" is what the step before came to."""
    space: Callable[[range], list[Values]]
    """The values there are, given the config's numbers."""
    circle: tuple[Point, float] | None = None


def singles(numbers: range) -> list[Values]:
    return [(a,) for a in numbers]


def pairs(numbers: range) -> list[Values]:
    return [(a, b) for a in numbers for b in numbers]


def angles(numbers: range) -> list[Values]:
    """Two of three angles that make 180 degrees."""
    return [(a, b) for a, b in pairs(numbers) if a + b < 180]


def corners(numbers: range) -> list[Values]:
    return [(a,) for a in numbers if a < 90]


def triples(_: range) -> list[Values]:
    """Legs and hypotenuse, whole, up to MAX_VALUE."""
    legs = [(a, b, math.isqrt(a * a + b * b)) for a in range(1, MAX_VALUE) for b in range(1, MAX_VALUE)]
    return [(a, b, c) for a, b, c in legs if c <= MAX_VALUE and a * a + b * b == c * c]


def same(values: Values) -> Values:
    return values


def third(v: Values) -> tuple[str, ...]:
    return f"{v[0]}+{v[1]}", "180-_"


def rest_of(whole: int) -> Callable[[Values], tuple[str, ...]]:
    return lambda v: (f"{whole}-{v[0]}",)


def x_last(places: Sequence[Place], x: int) -> tuple[Place, ...]:
    """The places with number `x` of them last."""
    return (*places[:x], *places[x + 1 :], places[x])


def mirrored(points: Sequence[Point]) -> tuple[Point, ...]:
    """Left and right exchanged."""
    return tuple((SIDE - x, y) for x, y in points)


def upside_down(points: Sequence[Point]) -> tuple[Point, ...]:
    return tuple((x, SIDE - y) for x, y in points)


def _triangle() -> Iterator[Family]:
    places = ((3, 3), (1, 5), (4, 5))
    for x in range(3):
        yield Family((((3.5, 0.1), (0.1, 6.9), (6.9, 6.9), (3.5, 0.1)),), x_last(places, x), same, third, angles)


def _angle() -> Iterator[Family]:
    base: tuple[Point, ...] = ((0.0, 6.0), (7.0, 6.0))
    rays: tuple[Point, ...] = ((0.6, 1.0), (3.5, 6.0), (6.4, 1.0))
    for x in range(3):
        yield Family((base, rays), x_last(((0, 4), (3, 2), (5, 4)), x), same, third, angles)
    ray: tuple[Point, ...] = ((4.5, 1.0), (3.5, 6.0))  # towards the smaller angle, whose place is the first
    for places, line in ((((5, 4), (1, 4)), ray), (((1, 4), (5, 4)), mirrored(ray))):
        yield Family((base, line), places, same, rest_of(180), singles)
    corner: tuple[Point, ...] = ((1.0, 0.0), (1.0, 6.0), (7.0, 6.0))
    square: tuple[Point, ...] = ((1.0, 5.4), (1.6, 5.4), (1.6, 6.0))
    for x in range(2):
        lines = (corner, square, ((1.0, 6.0), (6.0, 1.0)))
        yield Family(lines, x_last(((2, 1), (4, 4)), x), same, rest_of(90), corners)


def _parallel() -> Iterator[Family]:
    """A label at one of four places around one crossing, x at one around the other. The transversal leans so that the label's
    angle is acute."""
    lines = tuple(((0.0, y), (7.0, y)) for y in (1.5, 5.5))
    marks = tuple(((6.3, y - 0.3), (6.6, y), (6.3, y + 0.3)) for y in (1.5, 5.5))
    transversal: tuple[Point, ...] = ((4.7, 0.0), (2.3, 7.0))
    for line in (0, 4):
        for row, column, row_x, column_x in product(range(2), repeat=4):
            places = ((5 * column, line + 2 * row), (1 + 4 * column_x, 4 - line + 2 * row_x))
            acute_right = row == 0  # of a transversal that leans to the right: the upper right and the lower left angle
            leaning = transversal if (column == 1) == acute_right else mirrored(transversal)
            equal = (row + column) % 2 == (row_x + column_x) % 2
            yield Family((*lines, *marks, leaning), places, same, (lambda v: (f"{v[0]}",)) if equal else rest_of(180), corners)


def _circle() -> Iterator[Family]:
    center: Point = (4.0, 3.5)
    ring = (center, 2.95)
    inscribed: tuple[Point, ...] = ((1.25, 4.6), (4.0, 0.55), (6.75, 4.6))
    central: tuple[Point, ...] = ((1.25, 4.6), center, (6.75, 4.6))
    across: tuple[Point, ...] = ((1.05, 3.5), (6.95, 3.5))
    up: tuple[Point, ...] = ((4.0, 0.55), center)
    for turn, above, below in ((tuple, 2, 4), (upside_down, 4, 2)):
        shapes = ((turn(inscribed), turn(central)), (across, turn(up)))
        for lines, (small, large) in zip(shapes, (((3, above), (3, below)), ((4, above), (3, below))), strict=True):
            yield Family(lines, (small, large), same, lambda v: (f"{v[0]}*2",), singles, ring)
            yield Family(lines, (large, small), lambda v: (2 * v[0],), lambda v: (f"{v[0]}/2",), singles, ring)


def _length() -> Iterator[Family]:
    segment: tuple[Point, ...] = ((0.3, 3.5), (6.7, 3.5))
    ticks = tuple(((x, 3.2), (x, 3.8)) for x in (0.3, 3.5, 6.7))
    brace: tuple[Point, ...] = ((0.3, 4.1), (0.3, 4.5), (6.7, 4.5), (6.7, 4.1))
    for turn, parts, whole in ((tuple, 2, 5), (upside_down, 4, 1)):
        places = ((1, parts), (4, parts), (3, whole))
        lines = (segment, *ticks, turn(brace))
        yield Family(lines, places, same, lambda v: (f"{v[0]}+{v[1]}",), pairs)
        for x in range(2):
            yield Family(lines, x_last(places, x), lambda v: (v[0], v[0] + v[1]), lambda v: (f"{v[1]}-{v[0]}",), pairs)


def _right() -> Iterator[Family]:
    lines: tuple[tuple[Point, ...], ...] = (
        ((2.0, 0.2), (2.0, 4.9), (6.9, 4.9), (2.0, 0.2)),
        ((2.0, 4.4), (2.5, 4.4), (2.5, 4.9)),
    )
    places = ((0, 2), (3, 5), (4, 1))
    yield Family(lines, places, lambda v: v[:2], lambda v: (f"{v[0]}*{v[0]}+{v[1]}*{v[1]}", "sqrt(_)"), triples)
    for x in range(2):
        known = 1 - x
        yield Family(
            lines,
            x_last(places, x),
            (lambda v: v[1:]) if known else (lambda v: (v[0], v[2])),
            lambda v: (f"{v[1]}*{v[1]}-{v[0]}*{v[0]}", "sqrt(_)"),
            triples,
        )


KINDS: Mapping[str, Callable[[], Iterator[Family]]] = {
    "triangle": _triangle,
    "angle": _angle,
    "parallel": _parallel,
    "circle": _circle,
    "length": _length,
    "right": _right,
}


@cache
def families(kind: str) -> tuple[Family, ...]:
    """In an order that specs rely on."""
    return tuple(KINDS[kind]())
