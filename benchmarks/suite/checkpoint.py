"""Checkpoints: a save until it is committed (and until the loop may go on), and a restore; state and full buffer."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator

import jax

from benchmarks.suite.measure import Timed, rounds
from benchmarks.suite.replay import full_buffer
from benchmarks.suite.report import Line, line
from benchmarks.suite.sizes import Size, built
from popo_jax.runtime.checkpoints import Checkpoints


def run(size: Size) -> Iterator[Line]:
    """save, restore, in a temporary directory ($TMPDIR chooses the disk)."""
    b = built(size.train, jax.device_count())
    state = jax.block_until_ready(b.state(b.fresh_params(jax.random.key(0))))
    replay, steps, returned = full_buffer(size.train).arrays(), itertools.count(1), []
    arrays = sum(x.nbytes for x in jax.tree.leaves(state))
    host = sum(x.nbytes for x in replay.values())
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep_last=2, keep_best=0) as checkpoints:

        def save() -> None:
            began = time.perf_counter()
            checkpoints.save(next(steps), state=state, replay=replay, meta={"format": 1}, score=None)
            returned.append(time.perf_counter() - began)
            checkpoints.wait()

        parts = {"save": Timed(save), "restore": Timed(lambda: checkpoints.restore(None, b.abstract_state)[0])}
        got = rounds(parts, seconds=size.seconds)
    for name, seconds in got.seconds.items():
        extra = {"bytes": arrays + host, "buffer_bytes": host, "bytes_per_s": (arrays + host) / statistics.median(seconds)}
        if name == "save":
            extra["returned_s"] = statistics.median(returned[1:])
        yield line(f"checkpoint/{name}", size.name, seconds, others=got.others, **extra)
