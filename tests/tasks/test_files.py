"""Problem files: what is read, what is refused and where, and that held-out problems never leak into training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from popo_jax.task_config import CountdownConfig, TaskConfig
from popo_jax.tasks import countdown, get_task
from popo_jax.tasks.files import read_rows
from popo_jax.types import UserError

GOOD = '{"nums": [3, 5, 7], "target": 56}'


def jsonl(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def problems(n: int, first: int = 0) -> list[dict]:
    """n problems, all different, none of which the generator makes."""
    return [{"nums": [100 + i, 200], "target": 300 + i} for i in range(first, first + n)]


def refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as e:
        countdown.read(str(path))
    assert "\n" not in str(e.value)
    return str(e.value)


def test_jsonl_keeps_other_columns_and_skips_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f'{GOOD}\r\n\n  \n{{"nums": [0, 44], "target": -5, "source": "\u2028é"}}'.encode())
    expected = [{"nums": [3, 5, 7], "target": 56}, {"nums": [0, 44], "target": -5, "source": "\u2028é"}]
    assert countdown.read(str(path)) == countdown.read(epath.Path(path)) == expected
    assert [number for number, _ in read_rows(path, ("nums",))] == [1, 4]


def test_parquet_in_the_public_columns(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"target": [98, 64], "nums": [[44, 19, 35], [63, 95, 96]], "id": ["a", "b"]}), path)
    assert countdown.read(path) == [
        {"target": 98, "nums": [44, 19, 35], "id": "a"},
        {"target": 64, "nums": [63, 95, 96], "id": "b"},
    ]
    assert all(type(n) is int for p in countdown.read(path) for n in p["nums"])


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("3 5 7 56", "must be a JSON object, got '3 5 7 56'"),
        ('{"nums": [3, 5, 7], "target": 56', "must be a JSON object"),
        ("[3, 5, 7]", "must be a JSON object, got [3, 5, 7]"),
        ("null", "must be a JSON object, got None"),
        ("[" * 200000, "must be a JSON object"),
        ('{"nums": [3], "target": ' + "9" * 5000 + "}", "must be a JSON object"),
        ('{"target": 56}', "column nums is missing, found ['target']"),
        ('{"nums": [3, 5]}', "column target is missing, found ['nums']"),
        ("{}", "column nums is missing, found []"),
        ('{"nums": "3 5 7", "target": 56}', "nums must be a list of 1 to 8 whole numbers from 0 to 999999999, got '3 5 7'"),
        ('{"nums": 3, "target": 56}', "nums must be"),
        ('{"nums": null, "target": 56}', "nums must be"),
        ('{"nums": [], "target": 56}', "nums must be"),
        ('{"nums": [1, 2, 3, 4, 5, 6, 7, 8, 9], "target": 56}', "nums must be"),
        ('{"nums": [3, 5.0], "target": 56}', "nums must be a list of 1 to 8 whole numbers from 0 to 999999999, got [3, 5.0]"),
        ('{"nums": [3, NaN], "target": 56}', "nums must be"),
        ('{"nums": [3, "5"], "target": 56}', "nums must be"),
        ('{"nums": [3, true], "target": 56}', "nums must be"),
        ('{"nums": [3, null], "target": 56}', "nums must be"),
        ('{"nums": [3, [5]], "target": 56}', "nums must be"),
        ('{"nums": [3, -5], "target": 56}', "nums must be"),
        ('{"nums": [3, 1000000000], "target": 56}', "nums must be"),
        ('{"nums": [3, 5], "target": "56"}', "target must be a whole number of at most nine digits, got '56'"),
        ('{"nums": [3, 5], "target": 56.0}', "target must be a whole number of at most nine digits, got 56.0"),
        ('{"nums": [3, 5], "target": true}', "target must be"),
        ('{"nums": [3, 5], "target": null}', "target must be"),
        ('{"nums": [3, 5], "target": -1000000000}', "target must be"),
    ],
    ids=lambda x: x[:40],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: str, what: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    message = refusal(path)
    assert message.startswith(f"{path}, line 3: {what}") and len(message) < 400


def test_a_line_that_is_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\xff\xfe\n")
    assert refusal(path).startswith(f"{path}, line 2: must be a JSON object")


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        (
            {"nums": [[3, 5], [3.0, 5.0]], "target": [8, 8]},
            ", row 1: nums must be a list of 1 to 8 whole numbers from 0 to 999999999, got [3.0, 5.0]",
        ),
        ({"nums": [[3, 5], None], "target": [8, 8]}, ", row 2: nums must be"),
        ({"nums": [[3, 5], [3, None]], "target": [8, 8]}, ", row 2: nums must be"),
        (
            {"nums": [[3, 5], [3, 5]], "target": [8.0, 8.5]},
            ", row 1: target must be a whole number of at most nine digits, got 8.0",
        ),
        ({"nums": [[3, 5], [3, 5]], "target": [8, None]}, ", row 2: target must be"),
        ({"nums": [[True], [False]], "target": [1, 0]}, ", row 1: nums must be"),
        ({"numbers": [[3, 5]], "target": [8]}, ", row 1: column nums is missing, found ['numbers', 'target']"),
        (
            {"nums": pa.array([], pa.list_(pa.int64())), "target": pa.array([], pa.int64())},
            " must hold at least one problem, found none",
        ),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_bad_parquet_row_is_named_with_its_number(tmp_path: Path, columns: dict, what: str) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table(columns), path)
    assert refusal(path).startswith(f"{path}{what}")


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "cannot be read: No such file or directory" in refusal(tmp_path / "none.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    assert "cannot be read: Is a directory" in refusal(tmp_path / "folder.jsonl")
    for name, data in (("empty.jsonl", b""), ("blank.jsonl", b"\n \n\n")):
        (tmp_path / name).write_bytes(data)
        assert refusal(tmp_path / name) == f"{tmp_path / name} must hold at least one problem, found none"
    for data in (b"", b"PAR1", b"not parquet at all", b"PAR1" + b"\0" * 100 + b"PAR1"):
        (tmp_path / "p.parquet").write_bytes(data)
        assert refusal(tmp_path / "p.parquet").startswith(f"{tmp_path / 'p.parquet'} must be a parquet file: ")
    for name in ("p.csv", "p", "p.jsonl.gz"):
        assert " must end in .jsonl or .parquet, got " in refusal(tmp_path / name)


def test_a_parquet_file_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"nums": [[3, 5]] * 1000, "target": list(range(1000))}), path)
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(path).startswith(f"{path} must be a parquet file: ")


# Training and held-out

SMALL = CountdownConfig(train_problems=3000, eval_problems=100)


def load(**files: Any) -> tuple[list[dict], list[dict]]:
    """Both sides, without the prompt that every problem is asked with."""
    train, held_out = get_task("countdown").load(TaskConfig(countdown=SMALL, **files))
    assert not {countdown.key(p) for p in train} & {countdown.key(p) for p in held_out}
    assert {p.pop("prompt") for side in (train, held_out) for p in side} == {SMALL.prompt}
    assert all(p.pop("size") == len(p["nums"]) for side in (train, held_out) for p in side)
    return train, held_out


def test_no_file() -> None:
    assert load() == countdown.generate(SMALL)


def test_both_files(tmp_path: Path) -> None:
    a, b = jsonl(tmp_path / "a.jsonl", *problems(5)), jsonl(tmp_path / "b.jsonl", *problems(2, first=5))
    assert load(train_file=a, eval_file=b) == (problems(5), problems(2, first=5))


def test_files_that_overlap_are_refused_with_the_count(tmp_path: Path) -> None:
    again = [{**p, "nums": p["nums"][::-1]} for p in problems(3, first=2)]  # the same numbers the other way round
    a, b = jsonl(tmp_path / "a.jsonl", *problems(4)), jsonl(tmp_path / "b.jsonl", *again)
    with pytest.raises(UserError) as e:
        load(train_file=a, eval_file=b)
    assert str(e.value) == f"{b} must hold no problem of {a}, got 2 of 3 in both (order of the numbers aside)"


@pytest.mark.parametrize("given", ["train_file", "eval_file"])
def test_one_file_and_the_other_side_generated_without_its_problems(tmp_path: Path, given: str) -> None:
    generated = countdown.generate(SMALL)
    side = generated[1] if given == "train_file" else generated[0][:500]  # just what the other side would have got
    train, held_out = load(**{given: jsonl(tmp_path / "p.jsonl", *side)})
    if given == "train_file":
        assert train == side and len(held_out) == SMALL.eval_problems
    else:
        assert held_out == side and len(train) == SMALL.train_problems
