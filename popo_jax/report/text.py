"""Text that a model wrote, made safe to look at: nothing in it is invisible, and nothing turns the text around it."""

from __future__ import annotations

_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_UNSEEN = (0x00AD, 0x034F, 0x115F, 0x1160, 0x180E, 0x200B, 0x2028, 0x2029, *range(0x2060, 0x2066), 0x3164, 0xFEFF, 0xFFA0)
_TAGS = range(0xE0000, 0xE0080)
_NAMED = (*range(0x80, 0xA0), *_BIDI, *range(0x206A, 0x2070), *_UNSEEN, *_TAGS, *range(0xD800, 0xE000))
_SHOWN = {
    **{c: chr(0x2400 + c) for c in range(0x20) if chr(c) not in "\n\t"},
    0x7F: "\u2421",
    **{c: f"⟨U+{c:04X}⟩" for c in _NAMED},
}


def visible(text: str) -> str:
    """Control characters as their pictures (escape: ␛), marks of direction and of no width as ⟨U+202E⟩, and half surrogates.

    Line ends and tabs stay, joiners too (emoji and Persian need them).
    """
    return text.translate(_SHOWN)
