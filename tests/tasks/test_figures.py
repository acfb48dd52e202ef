"""Drawn figures: the answers that geometry gives, what stands where in the picture, what a guess gets, what is held out."""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest

from popo_jax.task_config import GeometryConfig
from popo_jax.tasks import figures
from popo_jax.tasks.glyphs import CELL, cells
from popo_jax.tasks.shapes import KINDS, families
from popo_jax.types import UserError

Row = dict[str, Any]


def drawn(**more: Any) -> tuple[list[Row], list[Row]]:
    return figures.generate(GeometryConfig(**{"train_problems": 1200, "eval_problems": 240, **more}))


def spec(p: Row) -> Row:
    return p["images"][0]["draw"]


def expected(kind: str, family: int, labels: list[int]) -> float:
    """By hand, from the figures as a person sees them, in the order of the families."""
    a, b = (*labels, 0)[:2]
    match kind:
        case "triangle":
            return 180 - a - b
        case "angle":
            return 180 - a - b if family < 3 else 180 - a if family < 5 else 90 - a
        case "parallel":
            sides = f"{family % 16:04b}"  # row and column of the label, row and column of x
            return a if sides.count("1") % 2 == 0 else 180 - a
        case "circle":
            return 2 * a if family % 2 == 0 else a / 2
        case "length":
            return a + b if family % 3 == 0 else b - a
        case _:
            return math.hypot(a, b) if family == 0 else math.sqrt(b * b - a * a)


def test_the_answers_are_what_geometry_says() -> None:
    seen = set()
    for p in [side for sides in drawn() for side in sides]:
        s = spec(p)
        seen.add((s["kind"], s["family"]))
        assert float(p["answer"]) == expected(s["kind"], s["family"], s["labels"]) > 0, s
        assert p["answer"].isdecimal() and all(1 <= n <= 198 for n in s["labels"])
    assert seen == {(k, i) for k in KINDS for i in range(len(families(k)))}


def test_a_transversal_leans_so_that_the_labelled_angle_is_acute() -> None:
    for f in families("parallel"):
        (x, y), transversal = f.places[0], f.lines[-1]
        upper, right, leans_right = y in (0, 4), x == 5, transversal[0][0] > transversal[1][0]
        assert leans_right == (upper == right)  # acute: upper right and lower left of a line that leans to the right


def test_the_text_gives_nothing_away() -> None:
    train, _ = drawn()
    assert {p["problem"] for p in train} == {"<image>Find x."}
    assert figures.TEXT.isascii() and not re.search(r"\d", figures.TEXT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_blind_guess_is_seldom_right(kind: str) -> None:
    train, held_out = drawn(kinds=(kind,), train_problems=4000, eval_problems=100)
    for side in (train, held_out):
        answers = Counter(p["answer"] for p in side)
        assert answers.most_common(1)[0][1] / len(side) <= 1 / 8, answers.most_common(3)
    coarse, _ = drawn(kinds=(kind,), low=10, high=80, step=10, train_problems=4000, eval_problems=4)
    assert Counter(p["answer"] for p in coarse).most_common(1)[0][1] / 4000 <= 1 / 7


def test_kinds_and_their_families_have_equal_shares() -> None:
    train, held_out = drawn(kinds=("triangle", "angle", "circle"))
    assert Counter(spec(p)["kind"] for p in train) == {"triangle": 400, "angle": 400, "circle": 400}
    assert Counter(spec(p)["kind"] for p in held_out) == {"triangle": 80, "angle": 80, "circle": 80}
    assert set(Counter(spec(p)["family"] for p in train if spec(p)["kind"] == "triangle").values()) == {133, 134}
    assert len({spec(p)["kind"] for p in train[:20]}) == 3  # mixed


@pytest.mark.parametrize("jitter", [0, 3])
def test_held_out_figures_never_occur_in_training(jitter: int) -> None:
    train, held_out = drawn(low=20, high=80, step=5, jitter=jitter, train_problems=5000)

    def keys(side: list[Row]) -> list[str]:
        return [json.dumps([spec(p)["kind"], spec(p)["family"], spec(p)["labels"]]) for p in side]

    assert len(set(keys(held_out))) == 240 and not set(keys(train)) & set(keys(held_out))


def test_the_seed_decides_and_held_out_stays_when_training_grows() -> None:
    assert drawn() == drawn() and drawn() != drawn(seed=1)
    assert drawn()[1] == drawn(train_problems=100)[1]
    assert {json.dumps(spec(p)) for p in drawn()[1]} != {json.dumps(spec(p)) for p in drawn(seed=1)[1]}


def test_the_default_is_quick_and_varied() -> None:
    began = time.process_time()
    train, held_out = figures.generate(GeometryConfig())
    assert time.process_time() - began < 2.0
    assert (len(train), len(held_out)) == (20000, 512)
    assert len({json.dumps(spec(p)) for p in train}) > 10000
    began = time.process_time()
    for p in train[:200]:
        figures.draw(spec(p))
    assert (time.process_time() - began) / 200 < 0.002 * 2  # twice what it is allowed, on a busy machine


# Pictures


def find(picture: Any, text: str) -> list[tuple[int, int]]:
    """Cells (column, row) of an unmoved picture of 56 pixels where the glyphs of `text` begin."""
    image, glyphs = np.array(picture.convert("L")), np.array(cells(text, 1))[:, 1:]
    inside = range(0, 56 - len(text) * CELL + 1, CELL)
    corners = [(x, y) for x in inside for y in range(0, 49, CELL)]
    seen = [image[y : y + CELL, x + 1 : x + 1 + glyphs.shape[1]] for x, y in corners]
    return [(x // CELL, y // CELL) for (x, y), s in zip(corners, seen, strict=True) if ((s == 0) == (glyphs == 0)).all()]


def test_labels_stand_in_fixed_cells() -> None:
    for p in drawn()[0][:400]:
        s, picture = spec(p), figures.draw(spec(p))
        f = families(s["kind"])[s["family"]]
        for text, place in zip([*map(str, s["labels"]), "x"], f.places, strict=True):
            assert place in find(picture, text), s
        assert len(find(picture, "x")) == 1


def test_every_number_is_told_from_every_other() -> None:
    pictures = {n: np.array(cells(str(n), 1)) for n in range(1, 199)}
    assert len({(p.shape, p.tobytes()) for p in pictures.values()}) == 198
    digits = [np.array(cells(str(d), 1)) for d in "0123456789x"]
    assert min((a != b).sum() for i, a in enumerate(digits) for b in digits[:i]) >= 4
    assert all(d.shape == (8, 8) and set(np.unique(d)) == {0, 255} for d in digits)


@pytest.mark.parametrize("size", [56, 112, 224])
@pytest.mark.parametrize("jitter", [0, 4])
def test_pictures_hold_their_labels_whole(size: int, jitter: int) -> None:
    """As many black pixels as the glyphs have: none cut off, none covered."""
    for p in drawn(size=size, jitter=jitter)[0][:100]:
        s, picture = spec(p), np.array(figures.draw(spec(p)))
        assert picture.shape == (size, size, 3) and set(np.unique(picture)) == {0, figures.GREY, 255}
        glyphs = sum((np.array(cells(text, size // 56)) == 0).sum() for text in [*map(str, s["labels"]), "x"])
        assert (picture[..., 0] == 0).sum() == glyphs, s


def test_the_same_spec_gives_the_same_picture_and_jitter_moves_it() -> None:
    train, _ = drawn(kinds=("triangle",), jitter=3)
    s = json.loads(json.dumps(spec(train[0])))
    assert figures.draw(s).tobytes() == figures.draw(spec(train[0])).tobytes()
    pictures = {figures.draw(s | {"move": [dx, dy, turn, 3]}).tobytes() for dx in (-3, 3) for dy in (-3, 3) for turn in (-3, 3)}
    assert len(pictures) == 8
    assert {tuple(spec(p)["move"]) for p in train} >= {(3, 3, 3, 3), (-3, -3, -3, 3)}
    assert "move" not in spec(drawn()[0][0])


# Working


@pytest.mark.parametrize(
    ("work", "slip", "at", "lines", "result"),
    [
        (("50+60", "180-_"), 0, 0, "50+60=110\n180-110=70", 70),
        (("50+60", "180-_"), 2, 0, "50+60=112\n180-112=68", 68),  # the slip goes on
        (("50+60", "180-_"), -2, 1, "50+60=110\n180-110=68", 68),
        (("30",), 0, 0, "30", 30),
        (("30",), 5, 0, "35", 35),
        (("90/2",), 0, 0, "90/2=45", 45),
        (("45*2",), -3, 0, "45*2=87", 87),
        (("8*8+15*15", "sqrt(_)"), 0, 0, "8*8+15*15=289\nsqrt(289)=17", 17),
        (("17*17-8*8", "sqrt(_)"), 1, 0, "17*17-8*8=225\nsqrt(225)=16", 16),
        (("5*5-4*4", "sqrt(_)"), -5, 0, "5*5-4*4=9\nsqrt(9)=8", 8),  # stays above 0
    ],
)
def test_working_by_hand(work: tuple[str, ...], slip: int, at: int, lines: str, result: int) -> None:
    assert figures.worked(work, slip=slip, at=at) == (lines, result)


# Settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kinds": ("square",)},
            "geometry.kinds must name some of triangle, angle, parallel, circle, length, right, each once",
        ),
        ({"kinds": ()}, "geometry.kinds must name some of"),
        ({"kinds": ("angle", "angle")}, "geometry.kinds must name some of"),
        ({"low": 0}, "geometry.low must lie between 1 and geometry.high, got 0"),
        ({"low": 81}, "geometry.low must lie between 1 and geometry.high, got 81"),
        ({"high": 100}, "geometry.high must be at most 99, got 100"),
        ({"step": 0}, "geometry.step must be at least 1, got 0"),
        ({"size": 48}, "geometry.size must be a multiple of 56, got 48"),
        ({"size": 100}, "geometry.size must be a multiple of 56, got 100"),
        ({"jitter": 5}, "geometry.jitter must lie between 0 and 4, got 5"),
        ({"train_problems": 0}, "geometry.train_problems must be at least 1, got 0"),
        (
            {"kinds": ("parallel",), "low": 95, "high": 99},
            "geometry.low must leave a parallel to draw, got 95 to 99 in",
        ),
        ({"kinds": ("circle",), "step": 20}, "geometry.eval_problems must be at most half of all problems, got 240 of 32"),
    ],
    ids=str,
)
def test_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        drawn(**change)


def test_as_many_as_half_can_be_held_out() -> None:
    train, held_out = drawn(kinds=("circle",), step=20, eval_problems=16, train_problems=100)
    assert (len(train), len(held_out)) == (100, 16)
    assert drawn(kinds=("circle", "triangle"), step=20, eval_problems=28)[1]
