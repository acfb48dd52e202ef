"""How a batch is split for a platform. What the split programs compute is tested in tests/rl/test_update.py."""

from __future__ import annotations

import dataclasses

import pytest

from popo_jax import build
from popo_jax.rl.state import abstract_batch
from popo_jax.split import CPU_TOKENS, DEVICE_TOKENS, GIB, fitted, memory, possible, split_for
from popo_jax.types import UserError
from tests import tiny


def micro(platform: str = "cpu", shards: int = 1, *, prompts: int = 16, tokens: int = 96, **dotted) -> int | None:
    c = tiny.config(
        batch__prompts=prompts,
        batch__group_size=8,
        sample__max_prompt_tokens=32,
        sample__max_response_tokens=tokens - 32,
        **dotted,
    )
    split = split_for(platform, c, shards)
    assert dataclasses.replace(split, batch=c.batch) == c
    return split.batch.micro_batch


def test_a_cpu_takes_the_largest_divisor_that_fits():
    assert micro() == 32 and 64 * 96 > CPU_TOKENS >= 32 * 96
    assert micro(prompts=3) == 24 and micro(prompts=2) == 16
    assert micro(batch__mini_batches=4) == 32 and micro(batch__mini_batches=8) == 16
    assert micro(tokens=2 * CPU_TOKENS) == 1


def test_rows_are_shared_out_evenly_over_the_shards():
    assert micro(shards=16) == 32 and micro(shards=64) == 64 and micro(shards=8, prompts=3) == 24


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_an_accelerator_takes_what_keeps_it_busy(platform):
    assert micro(platform) == 128 and micro(platform, batch__mini_batches=4) == 32
    assert micro(platform, tokens=DEVICE_TOKENS // 8) == 8 and micro(platform, 2, tokens=DEVICE_TOKENS // 8) == 16
    assert micro(platform, 4, tokens=2 * DEVICE_TOKENS) == 4


def test_what_is_set_stays():
    assert micro(batch__micro_batch="auto") == micro() == 32
    assert micro(batch__micro_batch=64) == 64 and micro("gpu", batch__micro_batch=64) == 64


def asked(limit: int, *, shards: int = 1, base: int = 100, per_row: int = 10):
    """(rows chosen, rows asked for) of a step that needs base + per_row * rows bytes, of 128 rows."""
    seen = []

    def needs(c):
        seen.append(c.batch.micro_batch)
        return base + per_row * c.batch.micro_batch

    c = tiny.config(batch__prompts=16, batch__group_size=8, batch__micro_batch="auto")
    return fitted("gpu", c, shards, needs, limit).batch.micro_batch, seen


@pytest.mark.parametrize(
    ("limit", "rows"), [(110, 1), (179, 4), (180, 8), (739, 32), (740, 64), (1379, 64), (1380, 128), (10**9, 128)]
)
def test_auto_takes_the_most_that_fits(limit, rows):
    chosen, seen = asked(limit)
    assert chosen == rows and len(seen) <= 4


def test_auto_keeps_to_what_the_shards_divide():
    assert asked(10**9, shards=16)[0] == 128 and asked(420, shards=16)[0] == 32
    assert possible(tiny.config(batch__prompts=6, batch__group_size=4), 4, "gpu") == [4, 8, 12, 24]


def test_auto_that_cannot_fit_says_what_is_needed():
    with pytest.raises(UserError, match=r"a train step of 1 rows at once must fit into .* GiB of a device, got 1.02e-07; split"):
        asked(109)


def test_the_memory_is_the_one_given_or_nine_tenths_of_the_devices():
    c = tiny.config(batch__micro_batch="auto", batch__memory_gb=2.0)
    assert memory(c, 10) == 2 * GIB and memory(tiny.config(), 1000) == 900
    with pytest.raises(UserError, match=r"batch\.memory_gb must be given with batch\.micro_batch auto"):
        memory(tiny.config(), None)


def test_auto_measures_the_train_step_itself():
    """With room for half of the batch's memory the compiled step takes fewer rows at once, and needs no more than there is."""
    kw = {"sample__max_response_tokens": 232, "batch__length_buckets": 1, "model__layers": 1}
    whole = tiny.built(tiny.config(**kw, batch__micro_batch=16))
    needed = build.device_bytes(
        whole.train_step.lower(whole.abstract_state, abstract_batch(whole.split, whole.model.c)).compile()
    )
    c = tiny.config(**kw, batch__micro_batch="auto", batch__memory_gb=needed / 2 / GIB)
    b = build.build(c, whole.model.c, eos_ids=whole.eos_ids, mesh=whole.mesh, fit=True)
    got = build.device_bytes(b.train_step.lower(b.abstract_state, abstract_batch(b.split, b.model.c)).compile())
    assert b.split.batch.micro_batch in (1, 2, 4, 8) and got <= needed / 2
