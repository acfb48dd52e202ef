"""Drawn geometry problems: labelled figures, one number missing, marked x. The numbers stand in the picture alone.

`generate` makes problems with a spec of each picture, `draw` the picture of a spec, the same every time. Held out are
figures with their values, however moved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from popo_jax.task_config import GeometryConfig
from popo_jax.tasks import quantities
from popo_jax.tasks.files import Row, Split
from popo_jax.tasks.glyphs import CELL, cells
from popo_jax.tasks.shapes import KINDS, MAX_VALUE, SIDE, Point, Values, families
from popo_jax.types import UserError

TEXT = "<image>Find x."
GREY = 110
"""Of the lines; digits are black."""
MAX_JITTER = 4


def generate(c: GeometryConfig) -> Split:
    """`train_problems` and `eval_problems` of `c.kinds` in equal shares, and of their families, as far as those suffice.

    Of a family's values at most half are held out; the others are gone through again where they are fewer than problems.
    Errors: UserError for a setting out of range, or too few values.
    """
    _check(c)
    spaces = {kind: _spaces(kind, c) for kind in c.kinds}
    room = [sum(len(s) // 2 for s in spaces[kind].values()) for kind in c.kinds]
    if c.eval_problems > sum(room):
        every = sum(len(s) for kind in c.kinds for s in spaces[kind].values())
        raise UserError(f"geometry.eval_problems must be at most half of all problems, got {c.eval_problems} of {every}")
    moves = np.random.default_rng([c.seed, len(KINDS)])
    sides: Split = ([], [])
    totals = zip(c.kinds, _shares(c.train_problems, [c.train_problems] * len(room)), _shares(c.eval_problems, room), strict=True)
    for kind, trained, held in totals:
        counts = [len(s) for s in spaces[kind].values()]
        shares = zip(_shares(trained, [trained] * len(counts)), _shares(held, [n // 2 for n in counts]), strict=True)
        for (family, space), (n, cut) in zip(spaces[kind].items(), shares, strict=True):
            order = np.random.default_rng([c.seed, list(KINDS).index(kind), family]).permutation(len(space))
            chosen = order[cut:][np.arange(n) % (len(space) - cut)], order[:cut]
            for side, numbers in zip(sides, chosen, strict=True):
                side += [_problem(c, kind, family, space[i], moves) for i in numbers.tolist()]
    train, held_out = ([side[i] for i in np.random.default_rng(c.seed).permutation(len(side)).tolist()] for side in sides)
    return train, held_out


def _check(c: GeometryConfig) -> None:
    kinds = f"name some of {', '.join(KINDS)}, each once"
    for name, test, expected in (
        ("kinds", c.kinds and set(c.kinds) <= KINDS.keys() and len(set(c.kinds)) == len(c.kinds), kinds),
        ("low", 1 <= c.low <= c.high, "lie between 1 and geometry.high"),
        ("high", c.high <= MAX_VALUE, f"be at most {MAX_VALUE}"),
        ("step", c.step >= 1, "be at least 1"),
        ("size", c.size >= SIDE * CELL and c.size % (SIDE * CELL) == 0, f"be a multiple of {SIDE * CELL}"),
        ("jitter", 0 <= c.jitter <= MAX_JITTER, f"lie between 0 and {MAX_JITTER}"),
        ("train_problems", c.train_problems >= 1, "be at least 1"),
    ):
        if not test:
            raise UserError(f"geometry.{name} must {expected}, got {getattr(c, name)}")


def _spaces(kind: str, c: GeometryConfig) -> dict[int, list[Values]]:
    """The values of each family that has some. Errors: UserError if none has."""
    numbers = range(c.low, c.high + 1, c.step)
    found = {i: space for i, f in enumerate(families(kind)) if (space := f.space(numbers))}
    if not found:
        raise UserError(f"geometry.low must leave a {kind} to draw, got {c.low} to {c.high} in steps of {c.step}")
    return found


def _shares(total: int, most: Sequence[int]) -> list[int]:
    """`total` in parts as equal as may be, part i at most most[i]; all of it, if that suffices."""
    parts, left = [0] * len(most), total
    for n, i in enumerate(sorted(range(len(most)), key=lambda i: most[i])):
        parts[i] = min(most[i], left // (len(most) - n))
        left -= parts[i]
    return parts


def _problem(c: GeometryConfig, kind: str, family: int, values: Values, moves: np.random.Generator) -> Row:
    f = families(kind)[family]
    labels = f.labels(values)
    spec: dict[str, Any] = {"kind": kind, "family": family, "labels": list(labels), "size": c.size}
    if c.jitter:
        spec["move"] = [*moves.integers(-c.jitter, c.jitter + 1, 3).tolist(), c.jitter]
    work = f.work(labels)
    return {"problem": TEXT, "answer": str(worked(work)[1]), "images": [{"draw": spec}], "work": work, "kind": kind}


def worked(work: Sequence[str], *, slip: int = 0, at: int = -1) -> tuple[str, int]:
    """(a line for each step, what comes out) of a problem's `work`; what step `at` comes to is off by `slip`, but stays above 0.

    worked(("50+60", "180-_")) == ("50+60=110\\n180-110=70", 70). A square root is always the step that slips.
    """
    value, lines = 0, []
    at = len(work) - 1 if work[-1].startswith("sqrt") else at
    for i, step in enumerate(work):
        text = step.replace("_", str(value))
        value = _result(text)
        if i == at and slip:
            value += slip if value + slip > 0 else -slip
        lines.append(f"{value}" if text.isdecimal() else f"{text}={value}")
    return "\n".join(lines), value


def _result(text: str) -> int:
    (quantity,) = quantities.read(text)
    return int(quantity.value)


def draw(spec: Mapping[str, Any]) -> Any:
    """The picture, a PIL image of mode RGB and `spec["size"]` pixels a side: grey lines, black digits, white ground."""
    from PIL import Image, ImageDraw

    f, size = families(spec["kind"])[spec["family"]], spec["size"]
    scale, place = size // (SIDE * CELL), _placing(spec)
    image = Image.new("L", (size, size), 255)
    pen = ImageDraw.Draw(image)
    for line in f.lines:
        pen.line([place(p) for p in line], GREY, width=scale)
    if f.circle is not None:
        center, radius = f.circle
        (x, y), r = place(center), radius * CELL * scale * _shrunk(spec)
        pen.ellipse((x - r, y - r, x + r, y + r), outline=GREY, width=scale)
        pen.rectangle((x - scale, y - scale, x + scale, y + scale), GREY)
    for text, (column, row) in zip([*map(str, spec["labels"]), "x"], f.places, strict=True):
        label = cells(text, scale)
        x, y = place((column + len(text) / 2, row + 0.5))
        left, top = round(x) - label.width // 2, round(y) - label.height // 2
        left, top = min(max(left, 0), size - label.width), min(max(top, 0), size - label.height)
        image.paste(label.crop((scale, 0, label.width, label.height)), (left + scale, top))  # a line in between cells stays
    return image.convert("RGB")


def _shrunk(spec: Mapping[str, Any]) -> float:
    """What a figure that may be moved is made smaller by, so that it stays inside."""
    return 1 - 2 * spec["move"][3] / (SIDE * CELL) if "move" in spec else 1.0


def _placing(spec: Mapping[str, Any]) -> Any:
    """From cells to pixels: moved and turned as the spec says."""
    unit, shrink = spec["size"] / SIDE, _shrunk(spec)
    dx, dy, turn, _ = spec.get("move", (0, 0, 0, 0))
    cos, sin, middle = math.cos(math.radians(turn)), math.sin(math.radians(turn)), SIDE / 2

    def place(p: Point) -> Point:
        x, y = shrink * (p[0] - middle), shrink * (p[1] - middle)
        moved = middle + x * cos - y * sin + dx / CELL, middle + x * sin + y * cos + dy / CELL
        return tuple(min(round(v * unit), spec["size"] - 1) for v in moved)  # type: ignore[return-value]

    return place
