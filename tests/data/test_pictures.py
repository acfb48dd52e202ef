"""Images of problems: what is refused and converted, what transformers' processor makes of them, what is kept."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest

from popo_jax.data.pictures import MOST_PIXELS, Eyes, Gallery, largest
from popo_jax.model_config import VisionConfig
from popo_jax.scenes import Pixels, Sizes, scene
from popo_jax.types import UserError

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("transformers")
V = VisionConfig(patch=7, merge=2, window=28, min_pixels=28 * 28, max_pixels=84 * 84, image_token=5)
PROBLEM = {"name": "p"}


def encoded(picture, kind="PNG", **more):
    out = io.BytesIO()
    picture.save(out, kind, **more)
    return out.getvalue()


def drawn(width, height, mode="RGB", seed=0):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8), mode)


def eyes(*sources, v=V, sizes=None):
    return Eyes(v, lambda problem: sources, sizes)


@pytest.mark.parametrize("size", [(45, 61), (28, 28), (200, 90), (10, 14), (301, 300)], ids=str)
def test_patches_are_those_of_transformers_processor(size):
    """Scaled, normalised and cut up by it; ours keeps bytes, which the device normalises, and one of the two equal frames."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pictures = [drawn(*size), drawn(size[1], size[0], seed=1)]
    whole = Qwen2VLImageProcessorPil(
        patch_size=7, merge_size=2, size={"shortest_edge": V.min_pixels, "longest_edge": V.max_pixels}
    )(images=pictures, return_tensors="np")
    seen = eyes(*map(encoded, pictures))
    got = seen.pixels(PROBLEM, "here")
    assert got.grids == tuple(map(tuple, whole["image_grid_thw"][:, 1:].tolist())) == seen.grids(PROBLEM, "here")
    ours = (got.patches.reshape(-1, 3, 49) / 255.0 - np.array(V.mean)[:, None]) / np.array(V.std)[:, None]
    theirs = whole["pixel_values"].reshape(-1, 3, 2, 49)
    for frame in range(2):
        np.testing.assert_allclose(ours, theirs[:, :, frame], atol=1e-6)
    assert got.patches.dtype == np.uint8


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "PA"])
def test_other_modes_become_what_a_person_sees(mode):
    grey = drawn(28, 28, "L")
    picture = grey.convert("RGB").convert(mode) if mode in ("CMYK", "RGBA") else grey.convert(mode)
    kind = "TIFF" if mode in ("CMYK", "PA") else "PNG"
    source = picture if mode == "PA" else encoded(picture, kind)
    got = eyes(source).pixels(PROBLEM, "here")
    expected = eyes(picture.convert("RGB")).pixels(PROBLEM, "here")
    np.testing.assert_array_equal(got.patches, expected.patches)


def test_what_is_transparent_is_white_and_a_camera_may_be_held_sideways():
    clear = Image.new("RGBA", (28, 28), (0, 0, 0, 0))
    assert (eyes(encoded(clear)).pixels(PROBLEM, "here").patches == 255).all()
    palette = drawn(28, 28, "L").convert("P")
    palette.info["transparency"] = 0
    assert eyes(encoded(palette, transparency=0)).pixels(PROBLEM, "here").patches.shape == (16, 147)
    sideways = drawn(56, 28)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert eyes(encoded(sideways, "JPEG", exif=exif)).pixels(PROBLEM, "here").grids == ((8, 4),)


def animated():
    out = io.BytesIO()
    drawn(28, 28).save(out, "GIF", save_all=True, append_images=[drawn(28, 28, seed=1)])
    return out.getvalue()


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            b"no picture",
            "FILE, line 3, image 2 must be a picture that Pillow opens, got a file of 10 bytes: UnidentifiedImageError",
        ),
        ("/nowhere.png", "FILE, line 3, image 2 must be a picture that Pillow opens, got /nowhere.png: FileNotFoundError"),
        (animated(), "FILE, line 3, image 2 must be one picture, got an animation of 2"),
        (encoded(Image.new("I;16", (28, 28))), "FILE, line 3, image 2 must have 8 bits a colour, got mode I;16"),
        (
            encoded(Image.new("1", (70000, 1000))),
            f"FILE, line 3, image 2 must have at most {MOST_PIXELS} pixels, got 70000 x 1000",
        ),
        (encoded(drawn(300, 1)), "FILE, line 3, image 2 must be of a usual shape, got 300 x 1 pixels"),
    ],
    ids=["bytes", "missing", "animated", "16 bits", "huge", "narrow"],
)
def test_what_is_no_picture_for_a_policy_is_one_sentence(source, sentence):
    """Told when the data is checked, before anything is trained."""
    for look in (Eyes.grids, Eyes.pixels):
        with pytest.raises(UserError) as e:
            look(eyes(encoded(drawn(28, 28)), source), PROBLEM, "FILE, line 3")
        assert str(e.value).startswith(sentence)


def test_a_file_that_is_cut_short_is_one_sentence():
    whole = encoded(drawn(90, 90))
    with pytest.raises(UserError, match="here, image 1 must be a whole picture, got one that cannot be decoded"):
        eyes(whole[: len(whole) // 2]).pixels(PROBLEM, "here")


@dataclasses.dataclass
class Source:
    problems: tuple
    made: list
    task: str = "t"

    def id(self, problem):
        return problem

    def scene(self, problem, where):
        self.made.append(where)
        grids = ((4, 4),)
        pixels = Pixels(np.full((16, 147), ord(problem) % 256, np.uint8), grids)
        return scene(pixels, np.array([3, 5, 5, 5, 5, 4]), V)


def test_a_gallery_keeps_what_there_is_room_for():
    source = Source(tuple("abcdefgh"), [])
    gallery = Gallery([source], megabytes=1)
    one = gallery("t", "c")
    assert gallery("t", "c") is one and source.made == ["task t, problem 3 (c)"] and gallery.nbytes == one.nbytes
    assert (one.patches == ord("c")).all()
    gallery._limit = int(2.5 * one.nbytes)
    for name in "abc":
        assert (gallery("t", name).patches == ord(name)).all()
    assert gallery("t", "c") is not one or len(source.made) == 3
    before = len(source.made)
    gallery("t", "b")
    gallery("t", "c")
    assert len(source.made) == before and gallery.nbytes == 2 * one.nbytes
    gallery("t", "a")
    assert len(source.made) == before + 1 and gallery.nbytes == 2 * one.nbytes
    with pytest.raises(UserError, match="the data of task t must have problem z"):
        gallery("t", "z")


def test_the_largest_prompt_decides_the_shapes():
    """(windows of 4 x 4 patches, tokens of 2 x 2): 6 x 10 patches fill 2 x 3 windows and have 15 tokens."""
    assert largest([((6, 10),), ((4, 4), (4, 4)), ()], V) == Sizes(6, 15)
    assert largest([((4, 4),) * 7], V) == Sizes(7, 28)
