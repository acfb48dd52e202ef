"""Numbers as people write answers: decimals, fractions, roots, pi, units, beside names such as "x =". Read strictly and bounded.

    sum = product (("+" | "-") product)*    product = power (("*" | "/") power | power)*    power = ("+" | "-")? atom ("^" atom)?
    atom = number | pi | \\frac a b | \\sqrt[n] a | sin, cos, tan of an atom, which may be in degrees | "(" sum ")" | "{" sum "}"
Two numbers side by side, words such as "or", a sign such as "\\pm", and characters of unknown meaning make no number.

A sum, product, quotient or power of plain numbers is not worked out, as in 180-60 or 2 \\cdot 3\\sqrt{2}. Worked out are 6/2, a
fraction of whole numbers whether it is reduced or not, 1 3/4, 4.5 \\times 10^3, 5\\sqrt{3}/2, 12\\pi - 8, \\sqrt{16}.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from popo_jax.tasks import units
from popo_jax.tasks.units import Number, Unit

MAX_LENGTH, MAX_DEPTH, MAX_BITS = 200, 16, 4096
"""Characters of an answer; brackets open at once; size of a whole number on the way."""
ROUNDED = 0.01
"""Half a unit of a rounded answer's last digit may be this share of the truth: 7.1 is 5\\sqrt{2}, but 1.4 is no \\sqrt{2}."""


@dataclass(frozen=True)
class Quantity:
    value: Number
    decimals: int | None
    """Digits after the point of a decimal number; None for anything else."""
    unit: Unit | None
    worked: bool = True
    """No operation on plain numbers is left to do."""
    approximate: bool = False
    """It stands behind a sign such as \\approx."""


class Unreadable(ValueError):
    """No number, or several."""


_SIGNS = str.maketrans(
    dict.fromkeys("\u00b0\u00ba", r"^\circ ")
    | dict.fromkeys("\u2212\u2013", "-")
    | dict.fromkeys("\u00d7\u00b7\u22c5", "*")
    | dict.fromkeys("\u00f7\u2044\u2215", "/")
    | dict.fromkeys("\u00a0\u2009\u202f", " ")
    | {"\u221a": r"\sqrt ", "\u03c0": r"\pi ", "\u00b2": "^2", "\u00b3": "^3", "\u2248": r"\approx "}
    | {"\u00bc": r"\frac14 ", "\u00bd": r"\frac12 ", "\u00be": r"\frac34 ", "\u2153": r"\frac13 ", "\u2154": r"\frac23 "}
    | {"\u2220": r"\angle ", "\u25b3": r"\triangle ", "\u03b8": r"\theta ", "\u03b1": r"\alpha ", "\u03b2": r"\beta "}
)
"""Degrees, minus, times, by, blanks, the root, pi, powers, common fractions, names of angles."""
_FONT = (
    r"\\(?:text(?:rm|bf|it|sf|tt|up|normal)?|math(?:rm|bf|it|sf|tt|normal)|operatorname|[mh]box|rm|bf|it|sf|tt)\s*\{([^{}]*)\}"
)
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.ASCII), to)
    for pattern, to in (
        (r"\\begin\{\w*\}|\\end\{\w*\}|\\mixed(?![A-Za-z])", r"\\unknown "),
        (r"(?<=\d)(?:\\[,;!:]|\{,\})(?=\d{3}(?!\d))", ","),
        (r"\\(?:left|right|displaystyle|big|Big|bigl|bigr)(?![A-Za-z])", ""),
        (r"\\[()\[\]]|\$", " "),
        (r"\\[,;:! ]|\\q?quad(?![A-Za-z])|~", " "),
        (_FONT, r" \1 "),
        (_FONT, r" \1 "),
        (r"\{\s*\\(?:rm|bf|it|sf|tt)(?![A-Za-z])([^{}]*)\}", r" \1 "),
        (r"\\(?:rm|bf|it|sf|tt)(?![A-Za-z])", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:times|cdot|ast)(?![A-Za-z])", "*"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])|\^\s*\{?\s*o\b\s*\}?", " deg "),
        (r"\\%", "%"),
        (r"(?<![A-Za-z\\])(sqrt|pi|sin|cos|tan)(?![A-Za-z])", r"\\\1 "),
        (r"\\(?:approx|simeq|sim|thickapprox|doteq)(?![A-Za-z])", "≈"),
        (r"\*\*", "^"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    )
)
"""In order. A font within a font takes two passes."""
_MIXED = tuple(
    re.compile(r"(?<![\d.,/^}])(\d+)" + fraction, re.ASCII)
    for fraction in (r"\s+(\d+)\s*/\s*(\d+)(?![\d.])", r"\s*\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
)
"""1 3/4 and 1\\frac{3}{4} are more than one."""
_SAYING = r"is|equals|about|approximately|approx\.?|roughly"
_WORDS = re.compile(rf"\s*(?:(?!.*\bnot\b)[A-Za-z\\ ]{{0,60}}\b(?:{_SAYING})\s)?\s*", re.ASCII | re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z\\{}_'() ]+")
_INDEX = re.compile(r"\\?angle\s*\d+|(?<=[A-Za-z}')])\s*_\s*\{?\s*\d+\s*\}?", re.ASCII)
_NO_NAME = re.compile(
    r"\\(?:sin|cos|tan|sqrt|frac|pi|log|ln)|\\(?:unknown|infty|pm|mp|neq?|[lg](?:eq?|t)|not)(?![A-Za-z])|\bnot\b", re.IGNORECASE
)
_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+\.?\d*(?![\d,])|\.\d+(?![\d,])", re.ASCII)
_DECIMAL = re.compile(r"[-+]?[\d,]*\.(\d+)", re.ASCII)
_TOKEN = re.compile(rf"\s*({_NUMBER.pattern}|\\[A-Za-z]+|deg(?![A-Za-z])|[-+*/^(){{}}\[\]])", re.ASCII)


def read(text: str) -> tuple[Quantity, ...]:
    """The quantities that a text equates: one for "x = 5 cm", two for "5\\sqrt{2} \\approx 7.07". Else none."""
    return _read(text) if len(text) <= MAX_LENGTH else ()


@lru_cache(maxsize=4096)
def _read(text: str) -> tuple[Quantity, ...]:
    first, *rest = re.split(r"([=≈])", normal(text, r"\\mixed{\1}{\2}{\3}"))
    parts = [("", first), *zip(rest[::2], rest[1::2], strict=True)]
    if rest:
        parts = [(sign, part) for sign, part in parts if not _is_name(part) and (sign or part.strip())]
    try:
        return tuple(_quantity(part, sign == "≈") for sign, part in parts)
    except (Unreadable, ArithmeticError, ValueError):  # division by zero, a root of a negative number, an overflow
        return ()


def _is_name(text: str) -> bool:
    text = _INDEX.sub("x", text).strip()
    return bool(_NAME.fullmatch(text) and not _NO_NAME.search(text))


def normal(text: str, mixed: str = r"(\1+\2/\3)") -> str:
    """The text in a plainer notation, without LaTeX's spacing and fonts; empty if it is longer than MAX_LENGTH."""
    if len(text) > MAX_LENGTH:
        return ""
    text = text.translate(_SIGNS)
    for pattern, to in _REWRITES:
        text = pattern.sub(to, text)
    for pattern in _MIXED:
        text = pattern.sub(mixed, text)
    return " ".join(text.split()).removesuffix(".").strip()


def _quantity(text: str, approximate: bool) -> Quantity:
    text = text[found.end() :] if (found := _WORDS.match(text)) else text
    text, unit = units.cut(text)
    decimal = _DECIMAL.fullmatch(text.strip().replace(" ", ""))
    reader = _Reader(text.strip())
    value = reader.whole()
    return Quantity(value, len(decimal[1]) if decimal else None, unit, reader.worked, approximate)


class _Reader:
    """Reads one text; what is not in the grammar, or grows too large, is Unreadable.

    A plain number is one whose value is a Fraction. `_form` is how the last part was written: a "whole" number or a "decimal"
    one, a "ten" with a power, or "", anything else.
    """

    def __init__(self, text: str):
        self.worked, self._form = True, ""
        self._text, self._tokens, self._at, self._depth = text, [], 0, 0
        position = 0
        while position < len(text):
            token = _TOKEN.match(text, position)
            if token is None:
                raise Unreadable
            self._tokens.append(token[1])
            position = token.end()

    def whole(self) -> Number:
        value = self._sum()
        if self._peek() or not math.isfinite(value):
            raise Unreadable
        return value

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, *expected: str) -> str:
        token = self._peek()
        if not token or (expected and token not in expected):
            raise Unreadable
        self._at += 1
        return token

    def _sum(self) -> Number:
        value = self._product()
        plain = isinstance(value, Fraction)
        while self._peek() in ("+", "-"):
            sign = self._take()
            other = self._product()
            self._free(not (plain and isinstance(other, Fraction)))
            plain |= isinstance(other, Fraction)
            value = bounded(value + other if sign == "+" else value - other)
        return value

    def _product(self) -> Number:
        value = self._power()
        above, below = self._factor(value), ""
        while token := self._peek():
            if token in ("*", "/"):
                self._take()
            elif token[0] not in "\\({":  # the end of the product, or a number after a factor, which the end of the text refuses
                break
            other = self._power()
            form = self._factor(other)
            if token == "/":
                self._free(not (form and below))
                below, value = below or form, bounded(value / other)
            else:
                self._free(not (form and above))
                above, value = above or form, bounded(value * other)
            self._free(not (above and below) or above == below == "whole")
        return value

    def _factor(self, value: Number) -> str:
        """How a plain factor is written; empty for one that may stand beside any other."""
        if not isinstance(value, Fraction) or self._form == "ten":
            return ""
        return self._form or "other"

    def _free(self, free: bool) -> None:
        """An operation ends. Not free: it should have been worked out."""
        self.worked &= free
        self._form = ""

    def _power(self) -> Number:
        sign = -1 if self._peek() == "-" else 1
        if self._peek() in ("+", "-"):
            self._take()
        base = self._atom()
        if self._peek() == "^":
            self._take()
            ten = self._form == "whole" and base == 10
            base = _raised(base, self._atom())
            self._free(ten or not isinstance(base, Fraction))
            self._form = "ten" if ten else ""
        return sign * base

    def _atom(self) -> Number:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable
        token = self._take()
        form = ""
        match token:
            case "(" | "{":
                value = self._sum()
                self._take(")" if token == "(" else "}")
                form = self._form
            case r"\pi":
                value = math.pi
            case r"\frac":
                value = self._fraction()
            case r"\mixed":
                value = self._atom()
                value += self._fraction()
            case r"\sqrt":
                value = self._root()
            case r"\sin" | r"\cos" | r"\tan":
                value = self._trigonometric(token)
            case _ if _NUMBER.fullmatch(token):
                value, form = Fraction(token.replace(",", "")), "decimal" if "." in token else "whole"
            case _:
                raise Unreadable
        self._depth -= 1
        self._form = form
        return bounded(value)

    def _fraction(self) -> Number:
        top = self._atom()
        above = self._factor(top)
        bottom = self._atom()
        below = self._factor(bottom)
        self._free(not (above and below) or above == below == "whole")
        return top / bottom

    def _root(self) -> Number:
        degree: Number = Fraction(2)
        if self._peek() == "[":
            self._take()
            degree = self._sum()
            self._take("]")
        return _raised(self._atom(), 1 / degree)

    def _trigonometric(self, name: str) -> float:
        opening = self._take("(", "{") if self._peek() in ("(", "{") else ""
        angle = float(self._sum() if opening else self._atom())
        if self._peek() == "deg":
            self._take()
            angle = math.radians(angle)
        if opening:
            self._take(")" if opening == "(" else "}")
        return {r"\sin": math.sin, r"\cos": math.cos, r"\tan": math.tan}[name](angle)


def _raised(base: Number, exponent: Number) -> Number:
    """base ^ exponent, exact where that is a fraction."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        p, n = exponent.numerator, exponent.denominator
        if n == 1:
            if max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(p) > MAX_BITS:
                raise Unreadable
            return base**p
        if exponent == Fraction(1, 2) and base >= 0:
            root = Fraction(math.isqrt(base.numerator), math.isqrt(base.denominator))
            if root * root == base:
                return root
    value = float(base) ** float(exponent)
    if isinstance(value, complex):
        raise Unreadable
    return value


def bounded(value: Number) -> Number:
    """Errors: Unreadable where a value is too large to go on with."""
    if isinstance(value, Fraction) and max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise Unreadable
    return value


def same(found: Quantity, gold: Quantity, tolerance: float) -> bool:
    """Is `found` the gold quantity? Where both state a unit, `found` is converted, and must measure the same thing.

    Where only one states a unit, any will do: the answers of Geometry3k have none. Two fractions must be equal. Otherwise the
    relative error may be up to `tolerance`. A decimal gold is also met by what rounds to it at its number of digits; a gold that
    is no fraction also by itself, rounded to a decimal number with enough digits (ROUNDED).
    """
    scale = units.factor(found.unit, gold.unit)
    if scale is None:
        return False
    value, exact = found.value * scale, isinstance(gold.value, Fraction) and gold.decimals is None
    if exact and isinstance(value, Fraction) and found.decimals is None:
        return value == gold.value
    v, g = _float(value), _float(gold.value)
    allowed = max(tolerance, 1e-9) * abs(g)
    if gold.decimals is not None:
        allowed = max(allowed, _half(gold.decimals))
    if found.decimals is not None and not exact and (half := _half(found.decimals) * float(scale)) <= ROUNDED * abs(g):
        allowed = max(allowed, half)
    return abs(v - g) <= allowed


def agrees(later: Quantity, first: Quantity, tolerance: float) -> bool:
    """May `later` be equated with `first`? They are the same, or it is approximate, and `first` within half its last digit."""
    if same(later, first, tolerance):
        return True
    scale, digits = units.factor(first.unit, later.unit), later.decimals
    if digits is None and isinstance(later.value, Fraction) and later.value.denominator == 1:
        digits = 0
    if not later.approximate or scale is None or digits is None:
        return False
    return abs(_float(first.value * scale) - _float(later.value)) <= _half(digits)


def _half(decimals: int) -> float:
    """Half a unit of the last of so many digits after the point."""
    return 0.5 * 10.0**-decimals * (1 + 1e-9)


def _float(value: Number) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
