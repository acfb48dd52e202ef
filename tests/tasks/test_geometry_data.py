"""Geometry problems from JSONL, parquet and the `datasets` library: columns, images, marks, what is held out, what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils.epath.testing import mock_epath
from PIL import Image

from popo_jax import problems
from popo_jax.task_config import GeometryConfig, TaskConfig
from popo_jax.tasks import geometry
from popo_jax.types import UserError

Rows = list[dict[str, Any]]


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (4, 4), shade).save(out, "PNG")
    return out.getvalue()


def task(folder: Path, rows: Rows, held_out: Rows | None = None, **more: Any) -> TaskConfig:
    """Beside images/0.png to images/7.png."""
    (folder / "images").mkdir(exist_ok=True)
    for i in range(8):
        (folder / "images" / f"{i}.png").write_bytes(png(i))
    files = {"train_file": folder / "train.jsonl"} | ({"eval_file": folder / "eval.jsonl"} if held_out is not None else {})
    for path, side in zip(files.values(), (rows, held_out or []), strict=False):
        path.write_text("".join(json.dumps(r) + "\n" for r in side))
    names = {name: str(path) for name, path in files.items()}
    return TaskConfig("geometry", geometry=GeometryConfig(**{"eval_problems": 1, **more}), **names)


def row(i: int, **more: Any) -> dict[str, Any]:
    return {"problem": "Find x.", "answer": str(i), "images": [f"images/{i}.png"], **more}


def loaded(c: TaskConfig) -> Rows:
    train, held_out = geometry.load(c)
    return sorted([*train, *held_out], key=lambda p: p["answer"])


def test_jsonl_lies_beside_its_images(tmp_path: Path) -> None:
    rows = [
        row(0),
        {"question": "x", "problem": "y?", "answer": 1, "images": "images/1.png"},
        row(2, images=["images/2.png"] * 2),
    ]
    found = loaded(task(tmp_path, rows))
    assert [p["problem"] for p in found] == ["<image>Find x.", "<image>y?", "<image><image>Find x."]
    assert [geometry.pictures(p) for p in found[:2]] == [[str(tmp_path / f"images/{i}.png")] for i in range(2)]
    assert found[0]["images"][0]["sha256"] == hashlib.sha256(png(0)).hexdigest()
    c = task(tmp_path, [{"question": f"{i}?", "solution": f"So \\boxed{{{i}}}.", "image": f"images/{i}.png"} for i in range(2)])
    assert [(p["problem"], p["answer"]) for p in loaded(c)] == [("<image>0?", "0"), ("<image>1?", "1")]
    absolute = task(tmp_path, [row(0, images=[str(tmp_path / "images" / "3.png")]), row(1)])
    assert geometry.pictures(loaded(absolute)[0]) == [str(tmp_path / "images" / "3.png")]


def test_marks_say_where_the_images_stand(tmp_path: Path) -> None:
    texts = ["Left <image>, right <image>.", "<image>Find x."]
    rows = [row(0, problem=texts[0], images=["images/0.png", "images/1.png"]), row(1, problem=texts[1])]
    assert [p["problem"] for p in loaded(task(tmp_path, rows))] == texts
    train, held_out = geometry.load(task(tmp_path, rows, instruction="Box it."))
    assert geometry.prompt_text([*train, *held_out][0]).endswith("\nBox it.")


def test_parquet_holds_bytes_or_paths(tmp_path: Path) -> None:
    c = task(tmp_path, [row(0)])
    images = [[{"bytes": png(0), "path": "0.png"}], [{"bytes": None, "path": "images/1.png"}]]
    rows = [{"problem": "<image>Find x.", "answer": str(i), "images": x} for i, x in enumerate(images)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = loaded(TaskConfig("geometry", train_file=str(tmp_path / "t.parquet"), geometry=c.geometry))
    assert [geometry.pictures(p) for p in found] == [[png(0)], [str(tmp_path / "images" / "1.png")]]
    same = loaded(task(tmp_path, [row(0), row(1)]))
    assert [geometry.problem_id(p) for p in found] == [geometry.problem_id(p) for p in same]  # wherever the content is
    flat = [{"problem": "Find x.", "answer": str(i), "image": png(i)} for i in range(2)]
    pq.write_table(pa.Table.from_pylist(flat), tmp_path / "t.parquet")
    found = loaded(TaskConfig("geometry", train_file=str(tmp_path / "t.parquet"), geometry=c.geometry))
    assert [geometry.pictures(p) for p in found] == [[png(0)], [png(1)]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"problem": "<image> and <image>"}, "line 2: problem must have one <image> for each of 1 images, got 2"),
        (
            {"images": ["images/1.png"] * 3, "problem": "<image>"},
            "problem must have one <image> for each of 3 images, got 1",
        ),
        ({"images": ["images/9.png"]}, "line 2: images must be a file that can be read, got"),
        ({"images": ["images"]}, "line 2: images must be a file that can be read, got"),
        ({"images": []}, "line 2: images must be at least one image, got []"),
        ({"images": None}, "line 2: column images is missing or empty, found 'problem', 'answer', 'images'"),
        ({"images": [3]}, "line 2: images must be the path of an image file, or its bytes, got 3"),
        ({"images": [{"bytes": None, "path": None}]}, "line 2: images must be the path of an image file, or its bytes, got"),
        ({"images": ["https://a.b/1.png"]}, "images must be the path of an image file, and no address, got 'https://a.b/1.png'"),
        ({"images": [{"path": "s3://a/1.png"}]}, "line 2: images must be the path of an image file, and no address, got 's3://a"),
        ({"images": "file:///1.png"}, "line 2: images must be the path of an image file, and no address, got 'file:///1.png'"),
        ({"images": " x+y.z-1://1.png"}, "line 2: images must be the path of an image file, and no address, got ' x+y.z-1://"),
        ({"images": [""]}, "line 2: images must be the path of an image file, or its bytes, got ''"),
        ({"problem": " "}, "line 2: problem must be a text that is not blank, got ' '"),
        ({"problem": 3}, "line 2: problem must be a text that is not blank, got 3"),
        ({"answer": " "}, "line 2: answer must be an answer that is not blank"),
        ({"answer": r"\text{ }"}, "line 2: answer must be short and not blank"),
        ({"answer": "9" * 201}, "line 2: answer must be short and not blank"),
        ({"answer": None}, "line 2: column answer is missing or empty"),
    ],
    ids=str,
)
def test_bad_rows_are_told_with_their_place(bad: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message.replace("found 'problem', 'answer', 'images'", "found"))) as e:
        geometry.load(task(tmp_path, [row(0), row(1, **bad)]))
    assert str(tmp_path / "train.jsonl") in str(e.value)


def test_pictures_beside_a_file_in_a_bucket_are_told_with_their_row() -> None:
    """They are there, but pictures are opened as files of this machine, as the first row's can be."""
    lines = "".join(json.dumps(r) + "\n" for r in (row(0, images=["/here/0.png"]), row(1))).encode()
    there = {"gs://b/train.jsonl": lines, "gs://b/images/1.png": png(1), "/here/0.png": png(0)}
    c = TaskConfig("geometry", train_file="gs://b/train.jsonl", geometry=GeometryConfig(eval_problems=1))
    with mock_epath(open=lambda _, path, mode: io.BytesIO(there[str(path)])), pytest.raises(UserError) as e:
        geometry.load(c)
    told = "gs://b/train.jsonl, line 2: images must be an image file on this machine, or its bytes, got 'gs://b/images/1.png'"
    assert str(e.value) == told


def test_missing_columns_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl must have a column images or image, found problem, answer$"):
        geometry.load(task(tmp_path, [{"problem": "p", "answer": "1"}]))
    with pytest.raises(UserError, match=r"must have a column problem or question, found text$"):
        geometry.load(task(tmp_path, [{"text": "p"}]))


def test_texts_repeat_and_the_images_tell_problems_apart(tmp_path: Path) -> None:
    rows = [row(i, answer="45") for i in range(6)] + [row(0, answer="45"), row(0, answer="46")]
    train, held_out = geometry.load(task(tmp_path, rows, eval_problems=3))
    ids = [{geometry.problem_id(p) for p in side} for side in (train, held_out)]
    assert len(held_out) == len(ids[1]) == 3 and len(ids[0] | ids[1]) == 7 and not ids[0] & ids[1]
    with pytest.raises(UserError, match=r"geometry\.eval_problems must leave a problem of .*\.jsonl to train on, got 7 of 7"):
        geometry.load(task(tmp_path, rows, eval_problems=7))


def test_two_files_must_not_share(tmp_path: Path) -> None:
    train, held_out = geometry.load(task(tmp_path, [row(0), row(1)], [row(2)]))
    assert (len(train), len(held_out)) == (2, 1)
    with pytest.raises(UserError, match=r"eval\.jsonl must hold no problem of .*train\.jsonl, got 1 of 2 in both"):
        geometry.load(task(tmp_path, [row(0), row(1)], [row(1), row(2)]))
    alone = task(tmp_path, [row(0)], [row(1)])
    with pytest.raises(UserError, match=r"^eval_file must come with a train_file or geometry\.dataset, got .*eval\.jsonl alone$"):
        geometry.load(TaskConfig("geometry", eval_file=alone.eval_file))


# Data sets of the hub


class Table(list):
    """Rows as the library gives them where no column holds images."""

    features = None


def test_a_hub_data_set_is_asked_for_by_name_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: Any, split: str) -> Table:
        asked.append((*args, split))
        offset = 0 if split == "train" else 4
        return Table(row(i, images=[{"bytes": png(i), "path": None}]) for i in range(offset, offset + 4))

    library = SimpleNamespace(load_dataset=load_dataset, Image=Image.Image, Sequence=list)
    monkeypatch.setitem(sys.modules, "datasets", library)
    c = TaskConfig("geometry", geometry=GeometryConfig(dataset="hiyouga/geometry3k", eval_split="test"))
    train, held_out = geometry.load(c)
    assert asked == [("hiyouga/geometry3k", None, "train"), ("hiyouga/geometry3k", None, "test")]
    assert [p["answer"] for p in train] == list("0123") and geometry.pictures(held_out[0]) == [png(4)]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"geometry\.dataset needs the datasets library, got none: pip install"):
        geometry.load(c)


@pytest.mark.parametrize("column", ["image", "images"])
def test_the_real_library_hands_out_files_undecoded(column: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"problem": "<image>Find x.", "answer": str(i)} for i in range(5)]
    feature = datasets.Image() if column == "image" else datasets.Sequence(datasets.Image())
    given = [{"bytes": png(i), "path": f"{i}.png"} for i in range(5)]
    columns = {k: [r[k] for r in rows] for k in ("problem", "answer")}
    features = datasets.Features({k: datasets.Value("string") for k in columns} | {column: feature})
    columns[column] = given if column == "image" else [[x] for x in given]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    c = TaskConfig("geometry", geometry=GeometryConfig(dataset=str(tmp_path / "set"), eval_problems=2))
    train, held_out = geometry.load(c)
    assert (len(train), len(held_out)) == (3, 2)
    assert all(geometry.pictures(p) == [png(int(p["answer"]))] for p in [*train, *held_out])
    assert problems._origin(c) == str(tmp_path / "set")
