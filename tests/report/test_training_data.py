"""What a run was trained on, counted again from its files by plain loops."""

from __future__ import annotations

from collections import Counter, defaultdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from popo_jax.report import slices
from popo_jax.report.counts import gini
from popo_jax.report.gradient import uses
from popo_jax.report.read import read
from popo_jax.report.training_data import section
from tests.report.runs import gains, write


def sampled(path):
    """Every row, with its step."""
    return [{**r, "step": int(f.stem)} for f in sorted((path / "samples").iterdir()) for r in pq.read_table(f).to_pylist()]


def replayed(path):
    return [{**r, "step": int(f.stem)} for f in sorted((path / "replays").iterdir()) for r in pq.read_table(f).to_pylist()]


def counted(path, *, keep=False):
    """([rows] uses in their own step, [rows] uses by replay)."""
    rows, again = sampled(path), Counter(r["group_id"] for r in replayed(path))
    fresh = [int(r["advantage"] != 0 and (keep or r["signal"] == "effective")) for r in rows]
    return rows, fresh, [again[r["group_id"]] * (r["advantage"] != 0) for r in rows]


def get(parts, id_):
    (found,) = [p for p in parts if p.id == id_]
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "r", steps=30, problems=45)


def test_prompts(path):
    rows, fresh, again = counted(path)
    bore, signals, groups = Counter(), defaultdict(set), defaultdict(set)
    for r, f, a in zip(rows, fresh, again, strict=True):
        bore[r["prompt_id"]] += f + a
        signals[r["prompt_id"]].add(r["signal"])
        groups[r["prompt_id"]].add(r["group_id"])
    never = [p for p in signals if not bore[p]]
    kinds = Counter(
        {frozenset(["all_right"]): "right", frozenset(["all_wrong"]): "wrong"}.get(frozenset(signals[p])) for p in never
    )
    n = len(signals)
    expected = [n, n - len(never), kinds["right"], kinds["wrong"], kinds[None]]
    table = get(section(read(path)).tables, "data/prompts")
    assert [r[1] for r in table.rows[:5]] == expected and sum(expected[1:]) == n
    assert [r[2] for r in table.rows[:5]] == pytest.approx([x / n for x in expected])
    per = [len(g) for g in groups.values()]
    assert [r[1] for r in table.rows[5:]] == pytest.approx([sum(per) / n, max(per)])


def test_weight(path):
    rows, fresh, again = counted(path)
    bore = Counter({r["prompt_id"]: 0 for r in rows})
    for r, f, a in zip(rows, fresh, again, strict=True):
        bore[r["prompt_id"]] += f + a
    held = sorted(bore.values())
    figure = get(section(read(path)).figures, "data/weight")
    series = figure.series[0]
    assert list(series.x) == pytest.approx([k / len(held) for k in range(len(held) + 1)])
    assert list(series.y) == pytest.approx([sum(held[:k]) / sum(held) for k in range(len(held) + 1)])
    by_pairs = sum(abs(a - b) for a in held for b in held) / (2 * len(held) * sum(held))
    assert f"Gini {by_pairs:.2f}" in figure.title and f"{by_pairs:.3f} of gradient" in figure.note
    area = sum((series.y[k] + series.y[k + 1]) / 2 / len(held) for k in range(len(held)))
    assert 1 - 2 * area == pytest.approx(by_pairs), "twice the area between the curve and equal shares"
    asked = list(Counter(r["prompt_id"] for r in rows).values())
    assert f"{gini(asked):.3f} of sampled" in figure.note


def test_mix(path):
    rows, fresh, again = counted(path)
    totals = [Counter(), Counter(), Counter()]
    for r, f, a in zip(rows, fresh, again, strict=True):
        for total, amount in zip(totals, (1, f, f + a), strict=True):
            total[r["slice/level"]] += amount
    figure = get(section(read(path)).figures, "data/mix-level")
    for series, total in zip(figure.series, totals, strict=True):
        assert list(series.x) == ["1", "2", "3"]
        assert list(series.y) == pytest.approx([total[v] / total.total() for v in "123"])
    assert totals[2].total() > totals[1].total(), "something was replayed"


def test_slices(path):
    rows, fresh, again = counted(path)
    table = get(section(read(path)).tables, "data/slices")
    ends = [pq.read_table(path / "evaluations" / f).to_pylist() for f in ("000000.parquet", "000030.parquet")]
    for row, value in zip(table.rows, "123", strict=True):
        mine = [i for i, r in enumerate(rows) if r["slice/level"] == value]
        without = sum(fresh[i] for i in mine) / sum(fresh)
        with_ = sum(fresh[i] + again[i] for i in mine) / (sum(fresh) + sum(again))
        asked = [[r["correct"] for r in end if r["slice/level"] == value] for end in ends]
        expected = (len({rows[i]["prompt_id"] for i in mine}), len(mine), sum(fresh[i] + again[i] for i in mine))
        assert row[:5] == ("level", value, *expected)
        assert row[5:] == pytest.approx((100 * (with_ - without), *(sum(a) / len(a) for a in asked)))


def test_gains_table_is_of_the_first_and_last_evaluation(path):
    table, found = get(section(read(path)).tables, "data/gains"), slices.gains(read(path))
    assert [r[:3] for r in table.rows] == [("all", "all", 60), *(("level", v, 20) for v in "123")]
    for row, g in zip(table.rows, found, strict=True):
        assert row[3:] == pytest.approx((g.first, g.last, 100 * g.difference, 100 * g.low, 100 * g.high, g.p, g.adjusted))
    assert "step 0 and step 30" in table.note and "4 comparisons" in table.note


def test_grpo_keeps_what_is_not_effective(tmp_path):
    """A group that is all wrong, but of unequal scores, bears a gradient there, and nowhere else."""
    path = write(tmp_path / "r", algorithm="grpo", steps=5)
    for file in (path / "samples").iterdir():
        table = pq.read_table(file)
        signal = ["all_wrong" if i < 8 else s for i, s in enumerate(table["signal"].to_pylist())]
        advantage = [0.5 if i < 8 else a for i, a in enumerate(table["advantage"].to_pylist())]
        table = table.set_column(table.column_names.index("signal"), "signal", pa.array(signal))
        pq.write_table(table.set_column(table.column_names.index("advantage"), "advantage", pa.array(advantage)), file)
    _, fresh, again = counted(path, keep=True)
    found = uses(read(path))
    assert found.fresh.tolist() == fresh and found.replayed.tolist() == again and not any(again)
    figure = get(section(read(path)).figures, "data/mix-level")
    assert [s.name for s in figure.series] == ["sampled responses", "gradient-bearing rows without replay"]
    _set(path, "algorithm", {"name": "popo"})
    assert uses(read(path)).fresh.tolist() == counted(path)[1] != fresh


def test_dapo_trains_on_the_first_effective_groups(tmp_path):
    path = write(tmp_path / "r", algorithm="dapo", steps=6)
    _set(path, "batch", {"prompts": 2, "group_size": 4})
    rows, fresh, _ = counted(path)
    expected, chosen = [], defaultdict(list)
    for r, f in zip(rows, fresh, strict=True):
        groups = chosen[r["step"]]
        if r["signal"] == "effective" and r["group_id"] not in groups and len(groups) < 2:
            groups.append(r["group_id"])
        expected.append(f if r["group_id"] in groups else 0)
    assert uses(read(path)).fresh.tolist() == expected and sum(expected) < sum(fresh)


def test_overlong_mask_leaves_cut_rows_out(tmp_path):
    path = write(tmp_path / "r", steps=6)
    for file in (path / "samples").iterdir():
        table = pq.read_table(file)
        ended = pa.array([i % 3 > 0 for i in range(len(table))])
        pq.write_table(table.set_column(table.column_names.index("ended"), "ended", ended), file)
    rows, fresh, again = counted(path)
    assert uses(read(path)).total.tolist() == [f + a for f, a in zip(fresh, again, strict=True)]
    _set(path, "loss", {"overlong": "mask"})
    assert uses(read(path)).total.tolist() == [(f + a) * r["ended"] for r, f, a in zip(rows, fresh, again, strict=True)]


def test_a_replay_means_the_group_sampled_before_it(tmp_path):
    """The same id twice in a run; a replay of a group that is not there."""
    path = write(tmp_path / "r", steps=3, skill=lambda level, step: 0.5)
    table = pq.read_table(path / "samples" / "000001.parquet")
    pq.write_table(table, path / "samples" / "000003.parquet")
    for step, ids in {2: [0], 3: [0, 0, 12345]}.items():
        some = {"slot": pa.array(range(len(ids))), "group_id": pa.array(ids), "age": pa.array([1] * len(ids))}
        pq.write_table(pa.table(some), path / "replays" / f"{step:06d}.parquet")
    run = read(path)
    found = uses(run)
    for step, times in {1: 3, 3: 0}.items():
        mine = [(u, a) for u, i, s, a in _rows(run, found) if (i, s) == (0, step)]
        assert mine and all(u == times * (a != 0) for u, a in mine)
    assert found.lost == 1 and any("1 replays" in n for n in section(run).notes)


def _rows(run, found):
    s = run.samples
    columns = (s[c].to_pylist() for c in ("group_id", "step", "advantage"))
    return list(zip(found.replayed.tolist(), *columns, strict=True))


def test_many_values_are_folded(tmp_path):
    path = write(tmp_path / "r", steps=10, problems=60)
    for folder in ("samples", "evaluations"):
        for file in (path / folder).iterdir():
            table = pq.read_table(file)
            pq.write_table(
                table.append_column("slice/topic", pa.array([f"t{p[-2:]}" for p in table["prompt_id"].to_pylist()])), file
            )
    run = read(path)
    counts = Counter(f"t{r['prompt_id'][-2:]}" for r in sampled(path))
    figure = get(section(run).figures, "data/mix-topic")
    x, y = figure.series[0].x, figure.series[0].y
    assert len(x) == 30 and x[-1] == "other" and list(x[:-1]) == sorted(x[:-1])
    for value, share in zip(x[:-1], y[:-1], strict=True):
        assert share == pytest.approx(counts[value] / counts.total())
    assert sum(y) == pytest.approx(1) and min(counts[v] for v in x[:-1]) >= max(counts[v] for v in counts if v not in x)
    found = {g.value: g.n for g in slices.gains(run) if g.name == "topic"}
    assert found["other"] == 31 and sum(found.values()) == 60
    for name in run.slices:
        code = slices.sliced(run, name).samples
        assert len(code) == len(run.samples) and code.min() == 0


def test_values_that_only_some_rows_have(tmp_path):
    """Two tasks, one of which has levels."""
    path = write(tmp_path / "r", steps=10)
    for file in (path / "samples").iterdir():
        table = pq.read_table(file)
        other = [p.startswith("train-1") for p in table["prompt_id"].to_pylist()]
        level = pa.array([None if o else v for o, v in zip(other, table["slice/level"].to_pylist(), strict=True)], pa.string())
        task = pa.array(["logic" if o else "math" for o in other])
        table = table.set_column(table.column_names.index("slice/level"), "slice/level", level)
        pq.write_table(table.set_column(table.column_names.index("task"), "task", task), file)
    found = section(read(path))
    tasks, levels = (get(found.figures, f"data/mix-{name}").series[0] for name in ("task", "level"))
    rows = sampled(path)
    n = Counter(r["task"] for r in rows)
    assert list(tasks.x) == ["logic", "math"] and list(tasks.y) == pytest.approx([n[t] / len(rows) for t in ("logic", "math")])
    n = Counter(r["slice/level"] for r in rows)
    assert dict(zip(levels.x, levels.y, strict=True)) == pytest.approx(
        {"1": 0, "2": n["2"] / (n["2"] + n["3"]), "3": levels.y[2]}
    )
    assert {f.id for f in found.figures} == {"data/weight", "data/mix-task", "data/mix-level"}


def test_runs_without_much(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("seed: 0\n")
    found = section(read(tmp_path / "empty"))
    assert (found.figures, found.tables) == ((), ()) and found.notes
    one = section(read(write(tmp_path / "one", steps=1)))
    assert get(one.tables, "data/prompts").rows[0][1] > 0 and get(one.tables, "data/gains")
    dull = section(read(write(tmp_path / "dull", steps=2, skill=lambda level, step: 0.0)))
    assert [f.id for f in dull.figures] == ["data/mix-level"] and "No sampled response bore a gradient." in dull.notes
    assert all(r[5] is None for r in get(dull.tables, "data/slices").rows)


def test_without_evaluations_or_advantages(tmp_path):
    path = write(tmp_path / "r", steps=4)
    for file in (path / "evaluations").iterdir():
        file.unlink()
    for file in (path / "samples").iterdir():
        table = pq.read_table(file)
        advantage = pa.array([float("nan") if i % 5 == 0 else a for i, a in enumerate(table["advantage"].to_pylist())])
        pq.write_table(table.set_column(table.column_names.index("advantage"), "advantage", advantage), file)
    run = read(path)
    found = section(run)
    assert [t.id for t in found.tables] == ["data/prompts", "data/slices"]
    assert all(r[6:] == (None, None) for r in found.tables[1].rows)
    total = uses(run).total.reshape(4, 32)
    assert not total[:, ::5].any() and total.any(), "an advantage of NaN bears none"


def test_the_mean_of_several_answers(tmp_path):
    """Four answers to a problem, one without a verdict."""
    path = write(tmp_path / "r", steps=10, held_out=12, held_out_skill=gains)
    for file in (path / "evaluations").iterdir():
        table = pq.read_table(file)
        rows = [
            {**r, "sample": k, "correct": v} for r in table.to_pylist() for k, v in enumerate((0.0, 0.25, r["correct"], None))
        ]
        pq.write_table(pa.Table.from_pylist(rows), file)
    whole = slices.gains(read(path))[0]
    raw = pq.read_table(path / "evaluations" / "000010.parquet").to_pylist()
    known = [r["correct"] for r in raw if r["correct"] is not None]
    assert whole.n == 12 and whole.last == pytest.approx(sum(known) / len(known))


def _set(path, key, value):
    config = yaml.safe_load((path / "config.yaml").read_text())
    (path / "config.yaml").write_text(yaml.safe_dump(config | {key: value}))


def test_a_group_replayed_in_several_steps_counts_each_time(tmp_path):
    path = write(tmp_path / "r", steps=6, algorithm="grpo")
    first = pq.read_table(path / "samples" / "000001.parquet").to_pylist()
    id_ = next(r["group_id"] for r in first if r["signal"] == "effective")
    for step in (3, 4, 6):
        table = {
            "slot": pa.array([0], pa.int64()),
            "group_id": pa.array([id_], pa.int64()),
            "age": pa.array([step - 1], pa.int64()),
        }
        pq.write_table(pa.table(table), path / "replays" / f"{step:06d}.parquet")
    run = read(path)
    used = uses(run).replayed
    mine = [i for i, (s, g) in enumerate(zip(run.samples["step"].to_pylist(), run.samples["group_id"].to_pylist(), strict=True))
            if (s, g) == (1, id_)]  # fmt: skip
    assert [used[i] for i in mine] == [3] * 4 and used.sum() == 12
