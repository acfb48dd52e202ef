"""The warm start's identity: what changes the policy it gives changes its key, and nothing else does."""

from __future__ import annotations

import pytest

from popo_jax import problems, sft
from popo_jax.tasks import mathematics
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
        {"chat__template": False},
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
        {"chat__prefix": "="},
        {"tasks": task(countdown={"train_problems": 63, "eval_problems": 16})},
        {"tasks": [{"name": "arithmetic", "arithmetic": {"train_problems": 64, "eval_problems": 16}}]},
    ],
    ids=str,
)
def test_what_it_reads_changes_its_key(setting):
    assert key(**setting) != key()


@pytest.mark.parametrize(("prefix", "closing"), [("", ""), ("=", ""), ("<think>\n", "</think>\n"), ("<think></think>", "")])
def test_the_teacher_closes_thinking_that_the_prompt_opens(prefix, closing):
    tasks = [{"name": "math", "math": {"train_problems": 64, "eval_problems": 16}}]
    c = tiny.config(tasks=tasks, chat__prefix=prefix, sample__max_prompt_tokens=400, warm_start__right=1.0)
    policy = sft.fresh_policy(c)
    examples = sft.Examples(c, problems.load(c, policy.tokenizer))
    for i in range(8):
        prompt, answer = examples[i].prompt, examples[i].answer
        assert prompt.text.endswith(prefix) and answer.startswith(closing)
        assert answer.removeprefix(closing)[0].isdigit() and "</think>" not in answer.removeprefix(closing)
        assert mathematics.grade(prompt.begun + answer, **prompt.answer).reason == "right"
