from __future__ import annotations

import errno
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popo_jax.runtime.checkpoints import Checkpoints, NpzHandler
from popo_jax.types import UserError

REPLAY = {"tokens": np.arange(5, dtype=np.int32), "ids": np.array(["a", "bc"]), "none": np.zeros(0, np.float32)}


def state(x: float, n: int = 64):
    return {"params": {"w": jnp.full((n, n), x), "b": jnp.arange(3) * x}, "step": jnp.int32(x)}


def abstract(s):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), s)


@pytest.fixture
def three(tmp_path):
    with Checkpoints(tmp_path / "c", keep_last=3, keep_best=0) as c:
        for step in (1, 2, 3):
            c.save(step, state=state(step), replay=REPLAY, meta={"format": 1, "n": step}, score=None)
    return tmp_path / "c"


def test_what_is_saved_is_restored(three):
    with Checkpoints(three, keep_last=3, keep_best=0) as c:
        assert c.steps() == [1, 2, 3]
        got, replay, meta = c.restore(None, abstract(state(0)))
        jax.tree.map(np.testing.assert_array_equal, got, state(3))
        assert got["step"].dtype == jnp.int32 and meta == {"format": 1, "n": 3, "step": 3}
        assert replay.keys() == REPLAY.keys()
        for name, values in REPLAY.items():
            np.testing.assert_array_equal(replay[name], values)
            assert replay[name].dtype == values.dtype
        assert c.read_meta(2)["n"] == 2 and c.read_replay(1).keys() == REPLAY.keys()
    assert {p.name for p in (three / "3").iterdir()} >= {"state", "replay", "meta"}
    assert (three / "3" / "replay" / "replay.npz").exists()


def test_a_relative_directory_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("runs/c", keep_last=1, keep_best=0) as c:
        c.save(1, state=state(1), replay=REPLAY, meta={}, score=None)
    assert (tmp_path / "runs" / "c" / "1" / "state").exists()


def test_the_newest_and_the_best_are_kept(tmp_path):
    scores = [0.1, 0.9, None, 0.3, 0.2, 0.25]
    with Checkpoints(tmp_path / "c", keep_last=2, keep_best=1) as c:
        for step, score in enumerate(scores):
            c.save(step, state=state(step), replay={}, meta={}, score=score)
        c.wait()
        assert c.steps() == [1, 4, 5]
        c.save(6, state=state(6), replay={}, meta={}, score=0.95)
        c.wait()
        assert c.steps() == [5, 6]


def test_a_half_written_checkpoint_is_never_listed(three):
    shutil.copytree(three / "3", three / "4.orbax-checkpoint-tmp-1")
    with Checkpoints(three, keep_last=3, keep_best=0) as c:
        assert c.steps() == [1, 2, 3]
        with pytest.raises(UserError, match="no committed checkpoint of step 4: committed are 1, 2, 3"):
            c.restore(4, abstract(state(0)))


def damaged_files(folder):
    """Files whose loss or truncation must not pass: all but Orbax's own bookkeeping."""
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size > 0]


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_damage_is_refused_or_harmless_never_wrong(three, how):
    """Each file of a checkpoint cut short or removed in turn: refused by path with the one before offered, or restored right."""
    keep, refused = three.parent / "keep", []
    shutil.copytree(three, keep)
    for path in damaged_files(three / "3"):
        if how == "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            path.unlink()
        with Checkpoints(three, keep_last=3, keep_best=0) as c:
            try:
                got, replay, meta = c.restore(3, abstract(state(0)))
            except UserError as e:
                assert (
                    "c/3 cannot be read" in str(e) and "--from-step 2" in str(e)
                ) or "no committed checkpoint of step 3" in str(e)
                refused.append(path.parts[len(three.parts) + 1])
            else:
                jax.tree.map(np.testing.assert_array_equal, got, state(3))
                assert meta["n"] == 3
                np.testing.assert_array_equal(replay["tokens"], REPLAY["tokens"])
        shutil.rmtree(three)
        shutil.copytree(keep, three)
    assert {"state", "replay", "meta"} <= set(refused)


@pytest.mark.parametrize("megabytes", [4, pytest.param(400, marks=pytest.mark.slow)])
def test_a_donated_state_is_saved_as_it_was(tmp_path, megabytes):
    """The next step overwrites the state's buffers while the save goes on behind."""
    n = int((megabytes * 1e6 / 4) ** 0.5)
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    s = {"w": jnp.zeros((n, n)), "step": jnp.int32(0)}
    with Checkpoints(tmp_path / "c", keep_last=6, keep_best=0) as c:
        for step in range(1, 7):
            s = bump(s)
            c.save(step, state=s, replay={}, meta={}, score=None)
            s = bump(bump(s))
        c.wait()
        for step in range(1, 7):
            got, _, _ = c.restore(step, abstract(s))
            assert np.unique(np.asarray(got["w"])).tolist() == [3 * step - 2]


def test_a_full_disk_is_one_sentence_and_costs_nothing_saved(three, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(NpzHandler, "save", full)
    c = Checkpoints(three, keep_last=3, keep_best=0)
    with pytest.raises(UserError, match=r"the disk is full; checkpoints committed before \(\[1, 2, 3\]\)"):
        c.save(4, state=state(4), replay=REPLAY, meta={}, score=None)
        c.wait()
    monkeypatch.undo()
    with Checkpoints(three, keep_last=3, keep_best=0) as again:
        assert again.steps() == [1, 2, 3]
        jax.tree.map(np.testing.assert_array_equal, again.restore(3, abstract(state(0)))[0], state(3))
