"""How a batch is split for a platform. What the split programs compute is tested in tests/rl/test_update.py."""

from __future__ import annotations

import dataclasses

import pytest

from popo_jax.build import CPU_TOKENS, split_for
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
def test_an_accelerator_takes_a_whole_mini_batch(platform):
    assert micro(platform) is None


def test_what_is_set_stays():
    assert micro(batch__micro_batch=64) == 64 and micro("gpu", batch__micro_batch=64) == 64
