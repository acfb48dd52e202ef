"""From a problem with pictures to the tokens that a policy reads: where they stand, how many tokens each has."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from popo_jax.config import ChatConfig
from popo_jax.data.chat import open_chat
from popo_jax.data.pictures import Eyes
from popo_jax.data.stream import Source
from popo_jax.data.tokenizer import VISION, characters
from popo_jax.model_config import VisionConfig
from popo_jax.types import UserError

Image = pytest.importorskip("PIL.Image")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in c %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5-VL's, without its default system message and videos."""
EYES = characters(sees=True)
START, PAD, END = (EYES.core.token_to_id(t) for t in VISION[:3])
V = VisionConfig(patch=7, merge=2, window=28, image_token=PAD, start_token=START, end_token=END)
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def source(text, sizes, template=None):
    tokenizer = dataclasses.replace(EYES, template=template)
    chat = open_chat(ChatConfig(), tokenizer, V)
    eyes = Eyes(V, lambda p: [Image.new("RGB", size) for size in sizes])
    return Source("t", 1.0, [{"text": text}], lambda p: p["text"], lambda p: "id", lambda p: {}, chat, eyes)


def test_a_picture_stands_where_it_is_marked_and_has_a_token_for_each_cell():
    s = source("a<image>b<image>", [(28, 42), (56, 28)])
    p = s.prompt(s.problems[0])
    assert p.text == f"a{PICTURE}b{PICTURE}"
    a, b = EYES.encode("a"), EYES.encode("b")
    np.testing.assert_array_equal(p.tokens, [*a, START, *[PAD] * 6, END, *b, START, *[PAD] * 8, END])
    scene = s.scene(s.problems[0], "here")
    assert len(scene.order) == 14 and scene.position.max() == 1 + 1 + 3 + 1 + 1 + 1 + 4
    assert (s.check(30, "here").tokens, s.check(30, "here").windows) == (14, 2 + 2)


def test_a_chat_template_gets_pictures_as_it_knows_them():
    s = source("look: <image> what?", [(28, 28)], TEMPLATE)
    p = s.prompt(s.problems[0])
    assert p.text == f"<|im_start|>user\nlook: {PICTURE} what?<|im_end|>\n<|im_start|>assistant\n"
    assert (p.tokens == PAD).sum() == 4 and p.begun == ""


def test_without_pictures_the_mark_is_text():
    tokenizer = dataclasses.replace(EYES, template=TEMPLATE)
    chat = open_chat(ChatConfig(), tokenizer, V)
    s = Source("t", 1.0, [{"text": "a<image>"}], lambda p: p["text"], lambda p: "id", lambda p: {}, chat)
    assert "a<image><|im_end|>" in s.prompt(s.problems[0]).text and len(s.scene(s.problems[0], "here").order) == 0


@pytest.mark.parametrize("text", ["no mark", "<image><image>", "<image> and <|image_pad|>"])
def test_marks_that_are_no_pictures_are_refused_with_their_row(text):
    with pytest.raises(UserError, match="must have a place in its prompt for each of its 1 images, got"):
        source(text, [(28, 28)]).check(99, "FILE")


def test_a_prompt_counts_with_its_pictures():
    with pytest.raises(UserError, match=r"must have a prompt of 1 to 20 tokens \(sample.max_prompt_tokens\), got 40"):
        source("<image>xy", [(84, 84)]).check(20, "FILE")
