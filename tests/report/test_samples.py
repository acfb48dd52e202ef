"""Which samples the page offers, and that they are what the files say."""

from __future__ import annotations

import base64
import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from popo_jax.report.read import read
from popo_jax.report.samples import MOST_CHARS, cut, section
from popo_jax.report.text import visible
from tests.report import runs


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return runs.write(tmp_path_factory.mktemp("runs") / "run", steps=60, age=2)


def raw(path, folder):
    """Every row of a folder by plain Python, with its step."""
    return [
        row | {"step": int(file.stem)}
        for file in sorted((path / folder).glob("*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]


def rewrite(path, step, change):
    """One samples file with its rows changed in place by `change`."""
    file = path / "samples" / f"{step:06d}.parquet"
    rows = pq.read_table(file).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), file)


def test_shown_groups_are_those_of_the_files(path):
    shown = section(read(path)).data["groups"]
    rows, replays = raw(path, "samples"), raw(path, "replays")
    assert len(shown) > 250
    for group in shown:
        mine = sorted((r for r in rows if r["group_id"] == group["group_id"]), key=lambda r: r["row"])
        assert {r["step"] for r in mine} == {group["step"]}
        assert {r["prompt"] for r in mine} == {group["prompt"]} and {r["signal"] for r in mine} == {group["signal"]}
        assert group["slices"] == {"level": mine[0]["slice/level"]} and group["prompt_id"] == mine[0]["prompt_id"]
        for answer, row in zip(group["answers"], mine, strict=True):
            assert {k: answer[k] for k in ("text", "score", "correct", "reason", "ended")} == {
                k: row[k] for k in ("text", "score", "correct", "reason", "ended")
            }
            assert answer["tokens"] == row["response_tokens"] and answer["advantage"] == pytest.approx(row["advantage"], rel=1e-5)
        again = [[r["step"], r["age"]] for r in replays if r["group_id"] == group["group_id"]]
        assert group["replays"] == again[:20] and group["uses"] == len(again)


def test_the_choice_is_bounded_spread_and_repeatable(path):
    run = read(path)
    few = section(run, most_groups=30)
    assert len(few.data["groups"]) == 30 and few == section(read(path), most_groups=30)
    steps = sorted({g["step"] for g in few.data["groups"]})
    assert steps[0] == 1 and steps[-1] == 60 and max(np.diff(steps)) <= 5
    assert "30 of 480 groups" in few.notes[0] and f"{len(steps)} of 60 steps" in few.notes[0]
    small = section(run, most_bytes=20_000)
    assert len(json.dumps(dict(small.data))) <= 21_000 and 5 < len(small.data["groups"]) < 100
    assert {g["signal"] for g in small.data["groups"]} == {"effective", "all_right", "all_wrong"}
    assert "left out to keep the page small" in small.notes[1]


def test_replayed_groups_are_preferred_a_little(path):
    run = read(path)
    shown = [g for g in section(run, most_groups=120).data["groups"] if g["signal"] == "effective"]
    used = {r["group_id"] for r in raw(path, "replays")}
    every = {r["group_id"] for r in raw(path, "samples") if r["signal"] == "effective"}
    share, of_all = np.mean([g["uses"] > 0 for g in shown]), len(used & every) / len(every)
    assert of_all < share < 1


def test_a_rare_signal_is_shown_wherever_it_occurs(tmp_path):
    path = runs.write(tmp_path / "run", steps=90)

    def invalid(rows):
        for r in rows[:4]:
            r |= {"signal": "invalid", "score": float("nan")}

    rewrite(path, 38, invalid)
    wanted = raw(path, "samples")
    ids = {r["group_id"] for r in wanted if r["signal"] == "invalid"}
    for most in (4, 400):
        shown = [g for g in section(read(path), most_groups=most).data["groups"] if g["signal"] == "invalid"]
        assert {g["group_id"] for g in shown} == ids and all(a["score"] is None for g in shown for a in g["answers"])


def test_only_files_of_chosen_steps_are_read(tmp_path, monkeypatch):
    run = read(runs.write(tmp_path / "run", steps=90))
    asked = []
    real = type(run).texts
    monkeypatch.setattr(type(run), "texts", lambda self, folder, step: asked.append(step) or real(self, folder, step))
    shown = section(run, most_groups=10).data["groups"]
    assert sorted(set(asked)) == sorted({g["step"] for g in shown}) and len(asked) == len(set(asked)) <= 12


def test_long_texts_are_cut_and_say_so(tmp_path):
    long = "x" * (MOST_CHARS + 5)
    path = runs.write(tmp_path / "run", steps=1, answer=lambda rng, prompt, right: long)
    text = section(read(path)).data["groups"][0]["answers"][0]["text"]
    assert text == "x" * MOST_CHARS + "… [cut: 4,000 of 4,005 characters are shown]"
    assert cut("x" * MOST_CHARS) == "x" * MOST_CHARS and cut(None) == ""


def picture(side, kind="PNG"):
    image = pytest.importorskip("PIL.Image")
    noise = np.random.default_rng(side).integers(0, 255, (side, side, 3), np.uint8)
    out = io.BytesIO()
    image.fromarray(noise).save(out, kind)
    return out.getvalue()


@pytest.fixture
def pictured(tmp_path):
    path = runs.write(tmp_path / "run", steps=1, prompts=6)
    (path / "images").mkdir()
    names = ["images/small.png", "images/large.png", "../secret.png", "images/none.png", "images/text.png", "images/small.png"]
    (path / "images" / "small.png").write_bytes(picture(40))
    (path / "images" / "large.png").write_bytes(picture(600))
    (path / "images" / "text.png").write_bytes(b"<svg onload='alert(1)'>")
    (tmp_path / "secret.png").write_bytes(picture(30))

    def images(rows):
        for r in rows:
            r["images"] = [names[r["group_id"]]]

    rewrite(path, 1, images)
    return path


def test_pictures_are_shown_small_and_only_from_the_run(pictured):
    from PIL import Image

    found = section(read(pictured))
    shown = found.data["images"]
    assert sorted(shown) == ["images/large.png", "images/small.png"]
    small, large = (base64.b64decode(shown[f"images/{n}.png"].split(",")[1]) for n in ("small", "large"))
    assert small == (pictured / "images" / "small.png").read_bytes() and shown["images/small.png"].startswith("data:image/png;")
    assert len(large) <= 60_000 and max(Image.open(io.BytesIO(large)).size) <= 600
    by_id = {g["group_id"]: g for g in found.data["groups"]}
    assert [by_id[i]["images_left_out"] for i in range(6)] == [0, 0, 1, 1, 1, 0] and by_id[5]["images"] == ["images/small.png"]
    said = " ".join(found.notes)
    assert "outside the run directory" in said and "cannot be read" in said and "are no pictures" in said


def test_without_pillow_large_pictures_are_left_out(pictured, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    found = section(read(pictured))
    assert sorted(found.data["images"]) == ["images/small.png"] and any("Pillow is not installed" in n for n in found.notes)


def test_pictures_together_are_bounded(pictured):
    found = section(read(pictured), most_bytes=12_000)
    assert sum(map(len, found.data["images"].values())) <= 6_000
    assert any("keep the page small" in n for n in found.notes)


def test_broken_runs(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("steps: 3\n")
    assert section(read(empty)).notes == ("There are no samples to browse.",) and not section(read(empty)).data
    torn = runs.write(tmp_path / "torn", steps=3)
    run = read(torn)
    (torn / "samples" / "000002.parquet").write_bytes(b"PAR1 torn")
    found = section(run)
    assert {g["step"] for g in found.data["groups"]} == {1, 3} and "Samples of step 2 cannot be read." in found.notes
    old = runs.write(tmp_path / "old", steps=2)
    for step in (1, 2):
        file = old / "samples" / f"{step:06d}.parquet"
        pq.write_table(pq.read_table(file).drop_columns(["signal", "advantage", "slice/level"]), file)
    for file in (old / "replays").iterdir():
        file.unlink()
    groups = section(read(old)).data["groups"]
    assert len(groups) == 16 and {g["signal"] for g in groups} == {"unknown"} and not any(g["uses"] for g in groups)
    assert section(read(runs.write(tmp_path / "one", steps=1))).data["groups"]


def test_nothing_in_a_shown_text_is_hidden():
    assert visible("a\x1b[31mred\x07\x7f\r\n\tb") == "a␛[31mred␇␡␍\n\tb"
    assert visible("\u202eevil\u2066\u200f\ufeff\u200b\x9b") == "⟨U+202E⟩evil⟨U+2066⟩⟨U+200F⟩⟨U+FEFF⟩⟨U+200B⟩⟨U+009B⟩"
    assert visible("\ud800 \U000e0041") == "⟨U+D800⟩ ⟨U+E0041⟩"
    assert visible("日本 עברית é 👩\u200d🔬 <b>") == "日本 עברית é 👩\u200d🔬 <b>"
