"""What processes tell each other: threads stand in for them, around a store that behaves like jax.distributed's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import jax
import pytest

from popo_jax.runtime.peers import LostPeer, Peers
from popo_jax.types import UserError


class Store:
    """Keys are written once; a barrier opens when all have come, and never twice."""

    def __init__(self, count: int):
        self.kept: dict[str, bytes] = {}
        self._count, self._barriers, self._lock = count, {}, threading.Lock()

    def key_value_set_bytes(self, key: str, value: bytes) -> None:
        assert key not in self.kept
        self.kept[key] = value

    def wait_at_barrier(self, name: str, milliseconds: int) -> None:
        with self._lock:
            barrier = self._barriers.setdefault(name, threading.Barrier(self._count))
        try:
            barrier.wait(2)
        except threading.BrokenBarrierError:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: a barrier\nmore") from None

    def key_value_dir_get_bytes(self, folder: str) -> list[tuple[str, bytes]]:
        return [(k, v) for k, v in self.kept.items() if k.startswith(folder)]

    def key_value_delete(self, key: str) -> None:
        del self.kept[key]


def together(n: int, work: Callable[[Peers], Any]) -> tuple[list[Any], Store]:
    """What each of n processes gives, or raises."""
    store, out = Store(n), [None] * n

    def one(i: int) -> None:
        try:
            out[i] = work(Peers(i, n, store))
        except Exception as e:
            out[i] = e  # type: ignore[call-overload]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return out, store


def test_all_hear_all_round_after_round_and_little_is_kept():
    got, store = together(3, lambda p: [p.tell("a", (p.index, round_)) for round_ in range(20)])
    assert got == [[[(i, round_) for i in range(3)] for round_ in range(20)]] * 3
    assert len(store.kept) == 3  # the last round's


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("items", [0, 1, 4, 7])
def test_work_is_shared_in_order(n: int, items: int):
    def work(p: Peers) -> Any:
        mine: list[int] = []
        return p.shared("w", items, lambda part: mine.extend(part) or [x * x for x in part]), mine

    got, _ = together(n, work)
    assert all(result == [x * x for x in range(items)] for result, _ in got)
    assert [x for _, mine in got for x in mine] == list(range(items))


def test_the_first_decides_and_its_error_is_everyones():
    assert together(3, lambda p: p.first("f", lambda: p.index + 5))[0] == [5, 5, 5]

    def refuse() -> None:
        raise UserError("the disk must have room, got none")

    got, _ = together(3, lambda p: p.first("f", refuse))
    assert [str(e) for e in got] == ["the disk must have room, got none"] * 3


def test_an_error_in_one_part_is_raised_in_all():
    def work(part: range) -> list[int]:
        if 2 in part:
            raise UserError("no 2")
        return list(part)

    got, _ = together(2, lambda p: p.shared("w", 4, work))
    assert [type(e) for e in got] == [UserError] * 2 and str(got[0]) == "no 2"


def test_what_differs_is_named():
    got, _ = together(3, lambda p: p.same("s", {"config": "a", "data": "xyz"[p.index]}))
    assert all(str(e) == "all processes of a run must have the same data, got x on process 0 and y on process 1" for e in got)
    assert together(2, lambda p: p.same("s", {"config": "a"}))[0] == [None, None]


def test_a_process_that_never_comes_is_told():
    store = Store(2)
    with pytest.raises(LostPeer, match=r"another of the run's 2 processes was lost \(DEADLINE_EXCEEDED: a barrier\)"):
        Peers(0, 2, store).tell("a", 1)


def test_alone_nothing_is_asked():
    p = Peers()
    assert p.tell("a", 1) == [1] and p.shared("w", 3, list) == [0, 1, 2] and p.first("f", lambda: 4) == 4
    p.same("s", {"config": "a"})
