"""Fingerprints of what is asked: they follow the chat settings."""

from __future__ import annotations

import pytest

from popo_jax import problems
from popo_jax.data import tokenizer as tokenizers
from tests import chatty, tiny

LONG = {"sample__max_prompt_tokens": 200}


def prints(folder, manner: str, **chat) -> dict[str, str]:
    c = tiny.config(**LONG, **{f"chat__{k}": v for k, v in chat.items()})
    return problems.asked(problems.load(c, tokenizers.load(chatty.save(folder, chatty.MANNERS[manner]))))


@pytest.mark.parametrize(
    ("manner", "chat"),
    [
        ("qwen3", {"template": False}),
        ("qwen3", {"system": "Be brief."}),
        ("qwen3", {"thinking": False}),
        ("qwen3", {"prefix": "<think>\n"}),
        ("llama3", {"date": "2026-01-02"}),
    ],
    ids=str,
)
def test_the_template_follows_every_chat_setting_and_the_data_none(tmp_path, manner, chat):
    plain, other = prints(tmp_path, manner), prints(tmp_path, manner, **chat)
    assert other["template"] != plain["template"] and other["data"] == plain["data"]
    assert prints(tmp_path, manner) == plain


def test_without_a_template_the_prompts_are_the_problems(tmp_path):
    assert prints(tmp_path, "qwen3", template=False) == problems.asked(problems.load(tiny.config(**LONG), tiny.TOKENIZER))
    assert prints(tmp_path, "qwen3", template=True) == prints(tmp_path, "qwen3")
