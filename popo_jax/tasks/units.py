"""Units behind a number: lengths, areas, volumes, angles, per cent. What a unit measures, and how large it is beside others."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction

Number = Fraction | float
"""A fraction where the value is known exactly."""
Unit = tuple[str, Number, int]
"""What it measures, how large it is beside others of its kind, and its power: square metres are ("length", 1, 2)."""

_LENGTHS = {
    **dict.fromkeys(("mm", "millimeter", "millimetre"), "0.001"),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), "0.01"),
    **dict.fromkeys(("dm", "decimeter", "decimetre"), "0.1"),
    **dict.fromkeys(("m", "meter", "metre"), "1"),
    **dict.fromkeys(("km", "kilometer", "kilometre"), "1000"),
    **dict.fromkeys(("in", "inch", "inches"), "0.0254"),
    **dict.fromkeys(("ft", "foot", "feet"), "0.3048"),
    **dict.fromkeys(("yd", "yard"), "0.9144"),
    **dict.fromkeys(("mi", "mile"), "1609.344"),
}
_UNITS: Mapping[str, tuple[str, Number]] = {
    **{name: ("length", Fraction(size)) for name, size in _LENGTHS.items()},
    **dict.fromkeys(("deg", "degree"), ("angle", Fraction(1))),
    **dict.fromkeys(("rad", "radian"), ("angle", 180 / math.pi)),
    "%": ("share", Fraction(1, 100)),
    "unit": ("", Fraction(0)),  # says nothing
}
_NAMES = "|".join(sorted((re.escape(n) for n in _UNITS), key=len, reverse=True))
_POWER = r"\^?\s*\{?\s*([23])\s*\}?|(squared|cubed)"
_UNIT = re.compile(
    rf"(?<![A-Za-z\\])(?:(sq|square|cu|cubic)\b\.?\s*)?(?P<name>{_NAMES})(?:s|es)?\.?\s*(?:{_POWER})?\s*$",
    re.ASCII | re.IGNORECASE,
)
_BRACED = re.compile(rf"\{{\s*([A-Za-z][A-Za-z. ]{{0,40}})\s*\}}(?=\s*(?:{_POWER})?\s*$)", re.ASCII)
"""Letters in braces at the end, as in 5 {cm}^2."""
_ARGUMENT = re.compile(r"\\(?:sin|cos|tan)\s*[\d.]+\s*$", re.ASCII)
"""What a degree sign behind it belongs to."""


def cut(text: str) -> tuple[str, Unit | None]:
    """The text without the unit that it ends in, and that unit. None: it names none, or only "units"."""
    text = _BRACED.sub(r" \1 ", text)
    tail = _UNIT.search(text)
    if tail is None or _ARGUMENT.search(text[: tail.start()]):
        return text, None
    kind, size = _UNITS[_singular(tail["name"])]
    power = {"2": 2, "3": 3, "squared": 2, "cubed": 3}.get((tail[3] or tail[4] or "").lower(), 1)
    power = {"s": 2, "c": 3}.get((tail[1] or " ")[0].lower(), power)
    return text[: tail.start()], (kind, size, power) if kind else None


def _singular(name: str) -> str:
    return name.lower() if name.lower() in _UNITS else name.lower().removesuffix("s")


def factor(unit: Unit | None, to: Unit | None) -> Number | None:
    """What a number of `unit` is multiplied by to be one of `to`: 1 where either is not stated. None: they measure other things.

    From mm to cm it is 1/10, from mm^2 to cm^2 1/100; from a length to an area there is none.
    """
    if unit is None or to is None or unit == to:
        return Fraction(1)
    if (unit[0], unit[2]) != (to[0], to[2]):
        return None
    return (unit[1] / to[1]) ** unit[2]
