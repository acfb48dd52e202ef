"""What a policy with eyes sees: the images of a prompt, laid out so that a batch of any images has one fixed shape.

Knows no device and opens no file. Letters: n patches of a prompt (padding of its windows included), f tokens of its images, s
tokens of the prompt; B rows of a batch, N, F and T the most of each that a row may have; K bytes of a patch.

Qwen2.5-VL's tower attends within windows of the image, in a few layers within all of it. Patches lie window by window, each
window padded to a whole one: windows are then rows of their own, and no kernel needs their sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from popo_jax.model_config import VisionConfig

NOWHERE = -1
"""Of padding: no image's patch, no place of a token."""
GREY = 127


class Images(NamedTuple):
    """What a batch of rows sees. On the host numpy, or `Repeated`; on devices jax arrays, split by rows."""

    patches: Any
    """uint8 [B, N, K]: colour, row and column of the pixels of a patch."""
    place: Any
    """int32 [B, N, 3]: number of the image in its row (NOWHERE: padding), row and column of the patch in it."""
    order: Any
    """int32 [B, F]: which cell (merge^2 patches, in order) becomes the row's next image token; NOWHERE beyond the last."""
    position: Any
    """int32 [B, T, 3]: time, row and column of every token, as the decoder's rotary positions take them."""


@dataclass(frozen=True, eq=False)
class Repeated:
    """An array [B, ..] on the host, of rows that occur more than once: each is held once, and an index makes copies."""

    held: np.ndarray
    """[S, ..]."""
    row: np.ndarray
    """int [B]: which of those held each row is."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.row), *self.held.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.held.dtype

    def ordered(self, order: np.ndarray) -> Repeated:
        """Row i of the result is row order[i]; nothing is copied."""
        return Repeated(self.held, self.row[order])

    def __getitem__(self, index: Any) -> np.ndarray:
        """As of a numpy array: `index` of rows, or a tuple that begins with it."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        rows = self.row[first]
        return self.held[rows][(slice(None),) * np.ndim(rows) + tuple(rest)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.held[self.row], dtype)


@dataclass(frozen=True, eq=False)
class Pixels:
    """The images of a prompt, scaled and cut up: cell by cell, rows of cells from the top."""

    patches: np.ndarray
    """uint8 [sum of grids, K]."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of patches of each image."""


@dataclass(frozen=True, eq=False)
class Scene:
    """One prompt's part of `Images`."""

    patches: np.ndarray
    """uint8 [n, K]."""
    place: np.ndarray
    """int32 [n, 3]."""
    order: np.ndarray
    """int32 [f]."""
    position: np.ndarray
    """int32 [s, 3]."""

    @property
    def shift(self) -> int:
        """Added to a later token's place in the row, it is its position: an image takes as many as its longer side."""
        return int(self.position.max()) + 1 - len(self.position)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.patches, self.place, self.order, self.position))


@dataclass(frozen=True)
class Sizes:
    """The most that a row may have."""

    windows: int
    tokens: int


def cells(grid: tuple[int, int], v: VisionConfig) -> int:
    """Tokens of an image."""
    return grid[0] * grid[1] // v.merge**2


def windows(grids: Sequence[tuple[int, int]], v: VisionConfig) -> int:
    """Windows of some images."""
    side = v.window_cells * v.merge
    return sum(-(-h // side) * -(-w // side) for h, w in grids)


def scene(pixels: Pixels, tokens: np.ndarray, v: VisionConfig) -> Scene:
    """The layout of a prompt's images; `tokens` int32 [s] have `v.image_token` once for each of theirs.

    Errors: ValueError if they have another number of them.
    """
    position = positions(tokens, pixels.grids, v)
    placed = [_windowed(grid, i, v) for i, grid in enumerate(pixels.grids)]
    starts = np.cumsum([0, *(h * w for h, w in pixels.grids)])
    cell = v.merge**2
    taken: list[np.ndarray] = []
    place: list[np.ndarray] = []
    order: list[np.ndarray] = []
    n = 0
    for (source, where), start in zip(placed, starts, strict=False):
        taken.append(np.where(source >= 0, source + start, -1))
        place.append(where)
        first = source.reshape(-1, cell)[:, 0]
        real = np.flatnonzero(first >= 0)
        order.append(n // cell + real[np.argsort(first[real])])
        n += len(source)
    source = np.concatenate([np.zeros(0, np.int64), *taken])
    patches = np.where(source[:, None] >= 0, pixels.patches[source], np.uint8(0)) if n else pixels.patches[:0]
    none = np.zeros((0, 3), np.int32)
    return Scene(
        patches, np.concatenate([none, *place]), np.concatenate([np.zeros(0, np.int64), *order]).astype(np.int32), position
    )


def _windowed(grid: tuple[int, int], image: int, v: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """(index of each slot's patch in cell order, -1 for padding, [n]; place int32 [n, 3]) of one image, window by window."""
    h, w = grid[0] // v.merge, grid[1] // v.merge
    side = v.window_cells
    H, W = -(-h // side) * side, -(-w // side) * side
    number = np.full((H, W), -1)
    number[:h, :w] = np.arange(h * w).reshape(h, w)
    tiled = number.reshape(H // side, side, W // side, side).swapaxes(1, 2).ravel()
    cell = v.merge**2
    source = np.where(tiled[:, None] >= 0, tiled[:, None] * cell + np.arange(cell), -1).ravel()
    within = np.arange(cell)
    row = tiled[:, None] // w * v.merge + within // v.merge
    column = tiled[:, None] % w * v.merge + within % v.merge
    place = np.stack([np.full(len(source), image), row.ravel(), column.ravel()], axis=1)
    place[source < 0] = (NOWHERE, 0, 0)
    return source, place.astype(np.int32)


def positions(tokens: np.ndarray, grids: Sequence[tuple[int, int]], v: VisionConfig) -> np.ndarray:
    """int32 [s, 3] (Qwen2-VL, arXiv:2409.12191): text counts on in all three, an image's tokens have one time and their row and
    column, and what follows goes on from the largest."""
    seen = np.flatnonzero(tokens == v.image_token)
    needed = sum(cells(g, v) for g in grids)
    if len(seen) != needed:
        raise ValueError(f"a prompt must have a token for each of its images' {needed} cells, got {len(seen)}")
    out = np.zeros((len(tokens), 3), np.int32)
    at, now, first = 0, 0, 0
    for grid in grids:
        h, w = grid[0] // v.merge, grid[1] // v.merge
        start = int(seen[first])
        out[at:start] = (now + np.arange(start - at))[:, None]
        now += start - at
        image = np.stack([np.zeros(h * w, np.int64), np.repeat(np.arange(h), w), np.tile(np.arange(w), h)], axis=1)
        out[start : start + h * w] = now + image
        at, now, first = start + h * w, now + max(h, w), first + h * w
    out[at:] = (now + np.arange(len(tokens) - at))[:, None]
    return out


def lay_out(scenes: Sequence[Scene], sizes: Sizes, T: int, v: VisionConfig, start: np.ndarray | None = None) -> Images:
    """One row for each scene; rows go on for T tokens, the prompt's first, from slot `start` int [B] on (None: 0).

    Errors: ValueError for a scene larger than `sizes`.
    """
    n = sizes.windows * v.window_patches
    for s in scenes:
        if len(s.patches) > n or len(s.order) > sizes.tokens or len(s.position) > T:
            got = f"{len(s.patches)}, {len(s.order)} and {len(s.position)}"
            raise ValueError(f"a scene must have at most {n} patches, {sizes.tokens} image tokens and {T} tokens, got {got}")
    B, K = len(scenes), 3 * v.patch**2
    out = Images(
        np.zeros((B, n, K), np.uint8),
        np.full((B, n, 3), (NOWHERE, 0, 0), np.int32),
        np.full((B, sizes.tokens), NOWHERE, np.int32),
        np.zeros((B, T, 3), np.int32),
    )
    for i, s in enumerate(scenes):
        out.patches[i, : len(s.patches)], out.place[i, : len(s.place)] = s.patches, s.place
        out.order[i, : len(s.order)] = s.order
        first = 0 if start is None else int(start[i])
        out.position[i] = (np.arange(T) - first + s.shift)[:, None]
        out.position[i, first : first + len(s.position)] = s.position
    return out


def abstract(B: int, sizes: Sizes, T: int, v: VisionConfig) -> Images:
    """(shape, dtype) of each field of B rows."""
    n = sizes.windows * v.window_patches
    return Images(((B, n, 3 * v.patch**2), np.uint8), ((B, n, 3), np.int32), ((B, sizes.tokens), np.int32), ((B, T, 3), np.int32))


def blind(s: Scene) -> Scene:
    """The same scene in grey: what is asked without the picture."""
    return replace(s, patches=np.full_like(s.patches, GREY))
