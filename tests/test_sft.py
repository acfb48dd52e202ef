"""The warm start's identity: what changes the policy it gives changes its key, and nothing else does."""

from __future__ import annotations

import pytest

from popo_jax import sft
from tests import tiny


def key(**dotted) -> str:
    c = tiny.config(**dotted)
    return sft.cache_key(c, sft.fresh_policy(c))


def task(**more) -> list[dict]:
    return [{"name": "countdown", "countdown": {"train_problems": 64, "eval_problems": 16}} | more]


@pytest.mark.parametrize(
    "setting",
    [
        {"seed": 5},
        {"algorithm__name": "grpo"},
        {"optim__learning_rate": 1e-5},
        {"tasks": task(arithmetic={"terms": 2})},
    ],
    ids=str,
)
def test_what_a_warm_start_does_not_read_leaves_its_key(setting):
    assert key(**setting) == key()


@pytest.mark.parametrize(
    "setting",
    [
        {"warm_start__seed": 5},
        {"warm_start__right": 0.9},
        {"model__layers": 1},
        {"sample__max_response_tokens": 7},
        {"tasks": task(countdown={"train_problems": 63, "eval_problems": 16})},
        {"tasks": [{"name": "arithmetic", "arithmetic": {"train_problems": 64, "eval_problems": 16}}]},
    ],
    ids=str,
)
def test_what_it_reads_changes_its_key(setting):
    assert key(**setting) != key()
