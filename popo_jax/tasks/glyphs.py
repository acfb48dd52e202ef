"""Digits and x as 5 x 7 pixels, drawn without smoothing: each in a cell of 8 x 8, so that a patch of a tiny model holds one."""

from __future__ import annotations

from functools import cache
from typing import Any

CELL = 8
"""Pixels of a cell's side, at scale 1."""
LEFT, TOP = 2, 1
"""Where a glyph begins in its cell."""
_ROWS = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00010 00100 01000 11111",
    "3": "11111 00010 00100 00010 00001 10001 01110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
    "x": "00000 00000 10001 01010 00100 01010 10001",
}


@cache
def cells(text: str, scale: int) -> Any:
    """A PIL image of mode L: the glyphs black in white cells side by side, CELL * scale high."""
    from PIL import Image

    image = Image.new("L", (CELL * len(text), CELL), 255)
    for i, character in enumerate(text):
        for y, row in enumerate(_ROWS[character].split()):
            for x, dark in enumerate(row):
                if dark == "1":
                    image.putpixel((CELL * i + LEFT + x, TOP + y), 0)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
