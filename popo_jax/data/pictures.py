"""Images of problems: opened, checked, scaled and cut up by transformers' processor, and kept as long as there is room.

A prompt or a group carries no image: its id finds the problem again, and with it the image. What is prepared once for a prompt
serves the rollout, its replays and evaluation.
"""

from __future__ import annotations

import functools
import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from etils import epath

from popo_jax import scenes
from popo_jax.model_config import VisionConfig
from popo_jax.scenes import Images, Pixels, Repeated, Scene, Sizes
from popo_jax.types import Group, Prompt, UserError

MOST_PIXELS = 2**26
"""Of an image file: 67 million, 200 MB when it is opened."""
PLAIN = ("RGB", "L", "1", "CMYK", "YCbCr", "HSV", "LAB")
CLEAR = ("RGBA", "LA", "PA", "P", "RGBa", "La")
"""Modes that may have transparent parts, which become white; any other (16 bits, floats) is refused."""

Problem = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Eyes:
    """How a policy is shown a task's pictures."""

    v: VisionConfig
    pictures: Callable[[Problem], Sequence[Any]]
    """Of a problem: bytes of an image file, a path, or a PIL image, for each image."""
    sizes: Callable[[Problem], Sequence[tuple[int, int]] | None] | None = None
    """Their (width, height), or None where that is not known without making them."""

    def grids(self, problem: Problem, where: str) -> tuple[tuple[int, int], ...]:
        """Rows and columns of patches of each image, which is not read whole. Errors: UserError for one that is refused."""
        where, found = standing(problem, where), self.sizes(problem) if self.sizes is not None else None
        if found is None:
            found = [_opened(x, _place(where, i)).size for i, x in enumerate(self.pictures(problem))]
        return tuple(self._grid(size, _place(where, i)) for i, size in enumerate(found))

    def pixels(self, problem: Problem, where: str) -> Pixels:
        """Errors: UserError for an image that cannot be decoded, or is refused."""
        where = standing(problem, where)
        pictures = [_coloured(_opened(x, _place(where, i)), _place(where, i)) for i, x in enumerate(self.pictures(problem))]
        grids = tuple(self._grid(p.size, _place(where, i)) for i, p in enumerate(pictures))
        K = 3 * self.v.patch**2
        if not pictures:
            return Pixels(np.zeros((0, K), np.uint8), ())
        got = _processor(self.v)(images=pictures, return_tensors="np")
        frames = np.asarray(got["pixel_values"]).reshape(-1, 3, self.v.temporal, self.v.patch**2)[:, :, 0]
        assert tuple(map(tuple, got["image_grid_thw"][:, 1:].tolist())) == grids
        return Pixels(np.rint(frames).astype(np.uint8).reshape(-1, K), grids)

    def files(self, problem: Problem, folder: epath.Path, name: str) -> list[str]:
        """Where each image can be looked at: its own file, else one in `folder`, which is written if it is not there."""
        known = [folder / f"{name}-{i + 1}.png" for i in range(len(self.grids(problem, name)))]
        if known and all(path.exists() for path in known):
            return [f"{folder.name}/{path.name}" for path in known]
        out = []
        for i, source in enumerate(self.pictures(problem)):
            if isinstance(source, str):
                out.append(source)
                continue
            folder.mkdir(parents=True, exist_ok=True)
            png = io.BytesIO()
            where = _place(standing(problem, name), i)
            _coloured(_opened(source, where), where).save(png, "PNG")
            known[i].write_bytes(png.getvalue())
            out.append(f"{folder.name}/{known[i].name}")
        return out

    def _grid(self, size: tuple[int, int], where: str) -> tuple[int, int]:
        width, height = size
        try:
            h, w = _library().smart_resize(height, width, self.v.cell, self.v.min_pixels, self.v.max_pixels)
        except ValueError as e:  # too long and narrow
            raise UserError(f"{where} must be of a usual shape, got {width} x {height} pixels: {e}") from e
        return h // self.v.patch, w // self.v.patch


class Drawn(Protocol):
    """Where a problem comes from: a `data.stream.Source`."""

    @property
    def task(self) -> str: ...

    @property
    def problems(self) -> Sequence[Problem]: ...

    @property
    def id(self) -> Callable[[Problem], str]: ...

    @property
    def eyes(self) -> Eyes | None: ...

    def scene(self, problem: Problem, where: str) -> Scene: ...


class Gallery:
    """What the prompts of some sources show, by task and id. Holds at most `megabytes` of it; may be asked by several threads."""

    def __init__(self, sources: Iterable[Drawn], megabytes: int):
        self._found: dict[tuple[str, str], tuple[Drawn, int]] = {}
        for source in sources:
            for i, problem in enumerate(source.problems):
                self._found.setdefault((source.task, source.id(problem)), (source, i))
        self._kept: OrderedDict[tuple[str, str], Scene] = OrderedDict()
        self._limit, self._lock = megabytes * 10**6, threading.Lock()
        self.nbytes = 0

    def __contains__(self, key: object) -> bool:
        """Of a (task, id)."""
        return key in self._found

    def _find(self, task: str, id: str) -> tuple[Drawn, int]:
        if (task, id) not in self._found:
            raise UserError(f"the data of task {task} must have problem {id}, whose picture is to be shown; it has not")
        return self._found[task, id]

    def files(self, task: str, id: str, folder: epath.Path) -> list[str]:
        """As `Eyes.files`."""
        source, i = self._find(task, id)
        return source.eyes.files(source.problems[i], folder, id) if source.eyes is not None else []

    def __call__(self, task: str, id: str) -> Scene:
        """Errors: UserError for an image that cannot be read, or an id that the data does not have."""
        key = (task, id)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        source, i = self._find(task, id)
        made = source.scene(source.problems[i], f"task {task}, problem {i + 1} ({id})")
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self.nbytes += made.nbytes
            while self.nbytes > self._limit and len(self._kept) > 1:
                self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        return made


@dataclass(frozen=True, eq=False)
class Shown:
    """What the prompts of some sources show, for a policy that sees."""

    gallery: Gallery
    sizes: Sizes
    """The most that one of them shows."""
    v: VisionConfig

    def files(self, prompts: Sequence[Prompt], folder: epath.Path) -> list[list[str]]:
        """Where the images of each prompt can be looked at; those that are no files are written into `folder`, once."""
        return [self.gallery.files(p.task, p.id, folder) for p in prompts]

    def scenes(self, prompts: Sequence[Prompt]) -> list[Scene]:
        return [self.gallery(p.task, p.id) for p in prompts]

    def rows(self, groups: Sequence[Group], T: int, rows: int) -> Images:
        """Of each response of some groups, a row of T tokens each, the rest of `rows` like the first; held once a group."""
        held = scenes.lay_out([self.gallery(g.task, g.prompt_id) for g in groups], self.sizes, T, self.v)
        of = np.repeat(np.arange(len(groups)), [len(g.lengths) for g in groups])
        of = np.concatenate([of, np.zeros(rows - len(of), of.dtype)])
        return Images(*(Repeated(x, of) for x in held))


def largest(found: Iterable[Sequence[tuple[int, int]]], v: VisionConfig) -> Sizes:
    """The most that any of these prompts' images need."""
    windows, tokens = 1, 1
    for grids in found:
        windows = max(windows, scenes.windows(grids, v))
        tokens = max(tokens, sum(scenes.cells(g, v) for g in grids))
    return Sizes(windows, tokens)


def standing(problem: Problem, otherwise: str) -> str:
    """Where a user finds a problem: the row that it was read from if it has it as its `place`, else `otherwise`."""
    return str(problem.get("place", otherwise))


def _place(where: str, i: int) -> str:
    return f"{where}, image {i + 1}"


def _opened(source: Any, where: str) -> Any:
    """A PIL image whose header has been read. Errors: UserError."""
    from PIL import Image

    if isinstance(source, Image.Image):
        return source
    try:
        Image.MAX_IMAGE_PIXELS = None  # ours is the limit, and it has a sentence
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)  # a phone's photo and its preview
    except MemoryError:
        raise
    except Exception as e:  # a broken file has Pillow raise whatever it comes upon
        got = f"a file of {len(source)} bytes" if isinstance(source, bytes) else str(source)
        raise UserError(f"{where} must be a picture that Pillow opens, got {got}: {type(e).__name__}") from e
    width, height = picture.size
    if width * height > MOST_PIXELS:
        raise UserError(f"{where} must have at most {MOST_PIXELS} pixels, got {width} x {height}")
    if frames > 1:
        raise UserError(f"{where} must be one picture, got an animation of {frames}")
    if picture.mode not in PLAIN + CLEAR:
        raise UserError(f"{where} must have 8 bits a colour, got mode {picture.mode}")
    return picture


def _coloured(picture: Any, where: str) -> Any:
    """Decoded, as the camera was held, in RGB; transparent parts white. Errors: UserError for a file that is cut short."""
    from PIL import Image, ImageOps

    try:
        picture.load()
        picture = ImageOps.exif_transpose(picture)
    except MemoryError:
        raise
    except Exception as e:
        raise UserError(f"{where} must be a whole picture, got one that cannot be decoded: {e}") from e
    if picture.mode in CLEAR:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        picture = white
    return picture.convert("RGB")


@functools.cache
def _processor(v: VisionConfig) -> Any:
    """Scales and cuts up alone: what is scaled to 0..1 and normalised is so on the device, from a byte a colour."""
    size = {"shortest_edge": v.min_pixels, "longest_edge": v.max_pixels}
    how = {"patch_size": v.patch, "merge_size": v.merge, "temporal_patch_size": v.temporal}
    return _library().Qwen2VLImageProcessorPil(size=size, do_rescale=False, do_normalize=False, do_convert_rgb=False, **how)


@functools.cache
def _library() -> Any:
    """transformers' processor of this family. Seconds to import, which only runs with pictures spend."""
    try:
        from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl
    except ImportError as e:
        raise UserError(f"images need transformers and pillow, got none: pip install 'popo-jax[vision]' ({e})") from e
    return image_processing_pil_qwen2_vl
