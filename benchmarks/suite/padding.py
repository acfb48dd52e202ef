"""The train step on rows of uneven lengths, with all padding computed and with micro-batches cut to their rows' lengths."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator

import jax
import numpy as np

from benchmarks.suite.measure import Timed, beside_peak, compiled
from benchmarks.suite.report import Line, line
from benchmarks.suite.sizes import Size, built
from benchmarks.suite.train_step import random_rows
from popo_jax.build import Built
from popo_jax.data.arrange import arrange, needed_lengths
from popo_jax.rl.state import Batch, batch_specs
from popo_jax.runtime.mesh import place

MEDIAN, SPREAD = 0.3, 0.7
"""Response lengths are log-normal: the median as a share of the limit, the deviation of their logarithm; 4 % reach the limit."""


def run(size: Size) -> Iterator[Line]:
    """A train step on uneven rows: whole, and cut to at most four lengths; half of the slots without weight, too."""
    if size.padded is None:
        return
    one = dataclasses.replace(size.padded, batch=dataclasses.replace(size.padded.batch, length_buckets=1))
    whole, cut = built(one, jax.device_count()), built(size.padded, jax.device_count())
    parts, shares = {}, {}
    for name, b, counted in (("whole", whole, 1.0), ("cut", cut, 1.0), ("half", cut, 0.5)):
        rows = uneven_rows(b, counted)
        batch, shares[name] = arranged(b, rows), computed(b, rows)
        step, holder = compiled(b.train_step, b.abstract_state, batch), [b.state(b.fresh_params(jax.random.key(0)))]

        def train(step=step, holder=holder, batch=batch) -> object:
            holder[0], out = step.call(holder[0], batch)
            return out

        parts[name] = Timed(train)
    got = beside_peak(parts, size)
    median = {name: statistics.median(got.seconds[name]) for name in parts}
    for name in parts:
        yield line(
            f"padding/{name}",
            size.name,
            got.seconds[name],
            tokens=int(shares[name]["needed"] * whole.c.rows * whole.c.row_tokens),
            peak=got.peak,
            others=got.others,
            of_whole=median[name] / median["whole"],
            lengths=list(cut.split.lengths if name != "whole" else whole.split.lengths),
            **{f"{k}_share": v for k, v in shares[name].items()},
        )


def uneven_rows(b: Built, counted: float) -> dict[str, np.ndarray]:
    """Rows of log-normal lengths; the last slots, all but a share `counted`, have no weight."""
    c, rows = b.c, random_rows(b)
    rng = np.random.default_rng(1)
    lengths = MEDIAN * c.sample.max_response_tokens * np.exp(SPREAD * rng.normal(size=c.rows))
    ends = c.sample.max_prompt_tokens + np.clip(lengths, 1, c.sample.max_response_tokens).astype(int)
    mask = rows["token_mask"] & (np.arange(c.row_tokens) < ends[:, None])
    kept = np.arange(c.rows) < counted * c.rows
    return rows | {"sampled_mask": mask, "token_mask": mask & kept[:, None]}


def arranged(b: Built, rows: dict[str, np.ndarray]) -> Batch:
    return place(Batch(**arrange(rows, b.split)[0]), b.mesh, batch_specs())  # type: ignore[arg-type]


def computed(b: Built, rows: dict[str, np.ndarray]) -> dict[str, float]:
    """Shares of the batch's rows x T tokens: those up to each row's last counted one, and those the step computes."""
    c, bucket = b.split, arrange(rows, b.split)[0]["bucket"]
    per_micro = c.rows // c.batch.mini_batches // c.micro_batches
    done = sum(c.lengths[i] for i in bucket.ravel() if i >= 0) * per_micro
    return {
        "needed": needed_lengths(rows["token_mask"]).sum() / (c.rows * c.row_tokens),
        "computed": done / (c.rows * c.row_tokens),
    }
