"""The pictures of visual tasks, small enough to stand in a page."""

from __future__ import annotations

import base64
import io
from collections import Counter
from pathlib import PurePosixPath
from typing import Any

from etils import epath

MOST_BYTES = 60_000
"""Of a picture as it is shown."""
MOST_FILE = 20_000_000
"""Larger files are not even read."""
_SIDES = (1024, 720, 512, 360, 240)
_KINDS = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpeg"), (b"GIF8", "gif"))


class Pictures:
    """Files of a run directory as data: URIs, as long as they fit in `most` bytes together."""

    def __init__(self, folder: epath.Path, most: int) -> None:
        self._folder, self._most = folder, most
        self._left_out: dict[str, str] = {}
        self.shown: dict[str, str] = {}
        """By file name."""
        self.size = 0

    def add(self, name: str) -> bool:
        """Whether it can be shown."""
        if name in self.shown:
            return True
        if name not in self._left_out:
            uri, why = self._uri(name)
            if uri and self.size + len(uri) > self._most:
                uri, why = None, "to keep the page small"
            if uri:
                self.shown[name] = uri
                self.size += len(uri)
                return True
            self._left_out[name] = why
        return False

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for every reason to leave some out."""
        return tuple(f"{n:,} pictures are not shown: {why}." for why, n in sorted(Counter(self._left_out.values()).items()))

    def _uri(self, name: str) -> tuple[str | None, str]:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "://" in name:
            return None, "they lie outside the run directory"
        file = self._folder / name
        try:
            if file.stat().length > MOST_FILE:
                return None, "too large to read"
            raw = file.read_bytes()
        except OSError:
            return None, "their files cannot be read"
        kind = next((k for start, k in _KINDS if raw.startswith(start)), None)
        if kind and len(raw) <= MOST_BYTES:
            return _data(raw, kind), ""
        try:
            from PIL import Image
        except ImportError:
            return None, f"over {MOST_BYTES // 1000} kB or of a format that only Pillow reads, and Pillow is not installed"
        small = _smaller(Image, raw)
        return (_data(small, "jpeg"), "") if small else (None, "their files are no pictures, or too large")


def _data(raw: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def _smaller(image: Any, raw: bytes) -> bytes | None:
    """A JPEG of at most MOST_BYTES, on white; None if `raw` is no picture that Pillow reads."""
    try:
        with image.open(io.BytesIO(raw)) as opened:
            if opened.width * opened.height > 50_000_000:
                return None
            whole = opened.convert("RGBA")
        for side in _SIDES:
            part = whole.copy()
            part.thumbnail((side, side))
            flat = image.new("RGB", part.size, "white")
            flat.paste(part, mask=part.getchannel("A"))
            out = io.BytesIO()
            flat.save(out, "JPEG", quality=80, optimize=True)
            if out.tell() <= MOST_BYTES:
                return out.getvalue()
    except Exception:  # whatever a broken file makes Pillow raise, the page can do without the picture
        return None
    return None
