"""Chat templates: the text and the ids are transformers'; what the prompt has begun of the response; what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from popo_jax.config import ChatConfig
from popo_jax.data import chat as chats
from popo_jax.data import tokenizer as tokenizers
from popo_jax.data.chat import Chat, open_chat
from popo_jax.data.stream import Example, Source, supervised
from popo_jax.types import UserError
from tests.chatty import LLAMA3, MANNERS, MISTRAL, QWEN3, QWEN25, R1, Manner, save

PROBLEMS = (
    "What is 1 + 1?",
    "  <b>&amp; \"quotes\" 'n' {{ braces }}</b>\n",
    "Zw\u00f6lf \u00d7 \u4e03 = \U0001f600?\n\nPut it within \\boxed{}.",
    "Why does it say <think> and </think> and <|im_end|>?",
)
TODAY = "2026-01-02"
MASK = {"__type": "AddedToken", "content": "<|end|>", "lstrip": False, "rstrip": False, "normalized": False}


def opened(folder: Path, manner: str | Manner, **settings) -> Chat:
    m = MANNERS[manner] if isinstance(manner, str) else manner
    return open_chat(ChatConfig(**settings), tokenizers.load(save(folder, m)))


def reference(folder: Path):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def theirs(folder: Path, problem: str, system: str | None = None, **values) -> tuple[str, list[int]]:
    """Text and ids of transformers."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": problem})
    t = reference(folder)
    text = t.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **values)
    return text, t.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False, **values)


@pytest.mark.parametrize(
    ("manner", "settings", "values"),
    [
        ("qwen25", {}, {}),
        ("qwen25", {"system": "Be brief."}, {}),
        ("qwen25", {"system": ""}, {}),
        ("qwen3", {}, {}),
        ("qwen3", {"thinking": True}, {"enable_thinking": True}),
        ("qwen3", {"thinking": False, "system": "Think."}, {"enable_thinking": False}),
        ("llama3", {}, {}),
        ("llama3", {"system": " Padded. "}, {}),
        ("r1", {}, {}),
        ("r1", {"system": "Reason."}, {}),
        ("mistral", {}, {}),
    ],
    ids=str,
)
def test_text_and_ids_are_transformers(tmp_path, manner, settings, values):
    chat = opened(tmp_path, manner, **settings)
    for problem in PROBLEMS:
        before = chat.render(problem)
        text, ids = theirs(tmp_path, problem, settings.get("system"), **values)
        assert text in (before, chat.render(problem))  # the day may change between them
        np.testing.assert_array_equal(chat.encode(text), ids)


def test_the_whole_environment_is_transformers(tmp_path):
    """Loop controls, the generation tag, JSON without HTML's escapes, and what is defined."""
    template = """{% for m in messages %}
    {% if m.role == 'system' %}{% continue %}{% endif %}
    {{ {'z': m.content, 'a': [1, none]} | tojson }} {{ m | tojson(indent=2, sort_keys=True) }}
    {% generation %}{{ m.content }}{% endgeneration %}

  {% break %}
{% endfor %}
{{ tools is none }} {{ documents is defined }} {{ unk_token is defined }}{{ mask_token }} {{ eos_token }}
{{ bos_token is defined }}
"""
    chat = opened(tmp_path, Manner(template, eos="<|end|>", config={"mask_token": MASK}))
    for problem in PROBLEMS:
        assert chat.render(problem) == theirs(tmp_path, problem)[0]
    assert '"z": "<b>&amp;\u00e9"' in chat.render("<b>&amp;\u00e9")


@pytest.mark.parametrize("manner", ["llama3", "mistral", "qwen25", "r1"])
@pytest.mark.parametrize("prefix", ["", "<think>\n"])
def test_a_raw_prompt_has_the_special_tokens_that_transformers_gives_it(tmp_path, manner, prefix):
    chat = opened(tmp_path, manner, template=False, prefix=prefix)
    for problem in PROBLEMS:
        assert chat.render(problem) == problem + prefix
        np.testing.assert_array_equal(chat.encode(problem + prefix), reference(tmp_path)(problem + prefix)["input_ids"])
    bos = MANNERS[manner].bos
    assert bos is None or chat.encode("a")[0] == chat.tokenizer.core.token_to_id(bos)


def test_a_prefix_is_part_of_the_prompt(tmp_path):
    chat = opened(tmp_path, "qwen25", prefix="<think>\n")
    assert chat.render("x") == opened(tmp_path, "qwen25").render("x") + "<think>\n"
    assert chat.encode(chat.render("x"))[-2] == chat.tokenizer.core.token_to_id("<think>")


def test_a_date_is_kept(tmp_path):
    assert "Today Date: 02 Jan 2026\n" in opened(tmp_path, "llama3", date=TODAY).render("x")
    t = tokenizers.load(tmp_path)
    dated = chats.dated(ChatConfig(), t)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", dated.date) and open_chat(dated, t)
    assert chats.dated(ChatConfig(date=TODAY), t).date == TODAY
    assert chats.dated(ChatConfig(template=False), t).date is None
    for other in (tokenizers.load(save(tmp_path / "other", MANNERS["r1"])), tokenizers.characters()):
        assert chats.dated(ChatConfig(), other).date is None


OPEN = "{{ messages[-1].content }}|{{ '<think>\n' }}"
BEGUN = [
    (R1, {}, "2?", "<think>\n"),
    (R1, {"prefix": "Okay"}, "2?", "<think>\nOkay"),
    (R1, {"prefix": "No.</think>"}, "2?", "<think>\nNo.</think>"),
    (R1, {"template": False}, "2?", ""),
    (R1, {"template": False, "prefix": "<think>\n"}, "2?", "<think>\n"),
    (QWEN25, {}, "2?", ""),
    (QWEN25, {}, "why <think>?", ""),
    (QWEN25, {}, "<think>", ""),
    (QWEN25, {"system": "Use <think>."}, "2?", ""),
    (QWEN25, {"prefix": "So <think>\n"}, "</think>", "So <think>\n"),
    (QWEN3, {}, "2?", ""),
    (QWEN3, {"thinking": False}, "2?", ""),
    (QWEN3, {"thinking": False, "prefix": "\\boxed{"}, "2?", "\\boxed{"),
    (OPEN, {}, "</think>", "<think>\n"),
    (OPEN, {}, f"a{chats.MARK}<think>b", "<think>\n"),
    (MISTRAL, {}, "<think>", ""),
    (None, {}, "<think>", ""),
    (None, {"prefix": "<think>"}, "<think>", "<think>"),
]


@pytest.mark.parametrize(("template", "settings", "problem", "begun"), BEGUN, ids=lambda x: repr(x)[:24])
def test_what_the_prompt_has_begun_of_the_response(tmp_path, template, settings, problem, begun):
    chat = opened(tmp_path, Manner(template, "<s>", "</s>"), **settings)
    assert chat.begun(problem) == begun and chat.render(problem).endswith(begun)


ASKS = "{{ messages[0].content }}"


def test_where_templates_live(tmp_path):
    """The later ones win; of several in a file the one named default counts."""
    save(tmp_path, Manner(None))
    assert tokenizers.load(tmp_path).template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "in json"}))
    assert tokenizers.load(tmp_path).template == "in json"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "of several" + ASKS}]
    for template in ("in the config" + ASKS, several):
        save(tmp_path, Manner(template))
        found = tokenizers.load(tmp_path).template
        assert found == ("of several" + ASKS if template is several else template)
        said = open_chat(ChatConfig(), tokenizers.load(tmp_path)).render("x")
        assert said == found.replace(ASKS, "x") == theirs(tmp_path, "x")[0]
    (tmp_path / "chat_template.jinja").write_text("\u2014 in a file")
    assert tokenizers.load(tmp_path).template == "\u2014 in a file" == theirs(tmp_path, "x")[0]


@pytest.mark.parametrize("decoder", [False, True])
def test_named_tokens_of_older_and_newer_folders(tmp_path, decoder):
    """special_tokens_map.json counts in folders without added_tokens_decoder."""
    names = "{{ bos_token }} {{ eos_token }} {{ pad_token }} {{ cls_token is defined }} " + ASKS
    added = {"added_tokens_decoder": {"256": {"content": "<s>", "special": True}}} if decoder else {}
    save(tmp_path, Manner(names, "<s>", "</s>", ("<old>",), config=added))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<old>"}, "pad_token": "<old>"}))
    chat = open_chat(ChatConfig(), tokenizers.load(tmp_path))
    assert chat.render("x") == ("<s> </s> </s> False x" if decoder else "<old> </s> <old> False x") == theirs(tmp_path, "x")[0]


def test_a_saved_tokenizer_keeps_its_template(tmp_path):
    t = tokenizers.load(save(tmp_path / "there", MANNERS["r1"]))
    (tmp_path / "again").mkdir()
    t.save(tmp_path / "again")
    again = tokenizers.load(tmp_path / "again")
    assert (again.template, again.named, again.fingerprint()) == (t.template, t.named, t.fingerprint())
    assert theirs(tmp_path / "again", "x") == theirs(tmp_path / "there", "x")


def test_a_prompt_is_neither_cut_nor_padded(tmp_path):
    save(tmp_path, MANNERS["qwen25"])
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    data["padding"] = padding | {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    t = tokenizers.load(tmp_path)
    assert [len(x) for x in t.encode_all(["a", "abcdefghijkl"])] == [1, 12] and len(t.encode("abcdef")) == 6


@pytest.mark.parametrize("settings", [{}, {"template": False}, {"prefix": "<think>\n"}], ids=str)
def test_streams_checks_and_the_warm_start_read_the_same_tokens(tmp_path, settings):
    chat = opened(tmp_path, "r1", **settings)
    problems = [{"text": p} for p in PROBLEMS]
    source = Source("t", 1.0, problems, lambda p: p["text"], lambda p: p["text"][:3], lambda p: {"answer": p["text"]}, chat)
    texts = [source.text(p) for p in problems]
    longest = 0
    for prompt, problem, checked in zip(map(source.prompt, problems), PROBLEMS, chat.encode_all(texts), strict=True):
        assert prompt.text == chat.render(problem) and prompt.begun == chat.begun(problem)
        np.testing.assert_array_equal(prompt.tokens, checked)
        batch = next(iter(supervised([Example(prompt, "4")] * 2, chat, batch=2, T=200, seed=0)))
        n = int(batch["answer_mask"][0].argmax())
        np.testing.assert_array_equal(batch["tokens"][0, :n], prompt.tokens)
        assert batch["tokens"][0, n : n + 2].tolist() == [*chat.tokenizer.encode("4"), chat.tokenizer.eos_ids[0]]
        assert batch["answer_mask"].sum(axis=1).tolist() == [2, 2]
        longest = max(longest, len(prompt.tokens))
    source.check(longest, "here")
    with pytest.raises(UserError, match=f"must have a prompt of 1 to {longest - 1} tokens .*, got {longest}$"):
        source.check(longest - 1, "here")


@pytest.mark.parametrize(
    ("template", "settings", "says"),
    [
        (None, {"template": True}, "chat.template: HERE must have a chat template, got none"),
        (None, {"system": "Hi"}, "chat.system goes with a chat template, HERE has none; got 'Hi'"),
        (None, {"thinking": False}, "chat.thinking goes with a chat template, HERE has none; got False"),
        (None, {"date": TODAY}, "chat.date goes with a chat template, HERE has none; got '2026-01-02'"),
        (R1, {"thinking": True}, "chat.thinking must be null: the chat template of HERE has no enable_thinking, got True"),
        (R1, {"date": TODAY}, "chat.date must be null: the chat template of HERE has no strftime_now, got '2026-01-02'"),
        (
            "{{ messages[-1].content }}",
            {"system": "Hi"},
            "chat.system must be null: the chat template of HERE leaves it out, got 'Hi'",
        ),
        ("a\n{% if %}", {}, "the chat template of HERE must be jinja, got line 2: Expected an expression"),
        ("{{ 1 | nofilter }}", {}, "the chat template of HERE must be jinja, got line 1: No filter named 'nofilter'"),
        (
            MISTRAL,
            {"system": "Hi"},
            "the chat template of HERE must render a system and user message, got TemplateError: Conversation roles",
        ),
        ("{{ messages[0].content + 1 }}", {}, "must render a user message, got TypeError: can only concatenate str"),
        ("{{ messages.__class__.__mro__ }}", {}, "must render a user message, got SecurityError: access to attribute"),
        ("{{ raise_exception('a\nb') }}", {}, "must render a user message, got TemplateError: a b"),
        (
            "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}?",
            {},
            "the chat template of HERE must write the user's message as it is, got '?' for '?'",
        ),
        (17, {}, "HERE/tokenizer_config.json: chat_template must be text, or a list of name and template, got 17"),
    ],
    ids=lambda x: repr(x)[:30],
)
def test_bad_templates_and_settings_are_one_sentence(tmp_path, template, settings, says):
    with pytest.raises(UserError, match=re.escape(says.replace("HERE", str(tmp_path)))) as e:
        opened(tmp_path, Manner(template), **settings).render("x")
    assert len(str(e.value).splitlines()) == 1


def test_a_template_that_is_not_text_is_one_sentence(tmp_path):
    save(tmp_path, Manner(None))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"chat_template\.jinja must be text in UTF-8"):
        tokenizers.load(tmp_path)


def test_a_broken_template_that_is_not_wanted_is_not_read(tmp_path):
    assert opened(tmp_path, Manner("{% if %}"), template=False).render("x") == "x"


def test_a_fresh_policy_has_no_template():
    with pytest.raises(UserError, match=r"^chat\.template: the tokenizer must have a chat template, got none$"):
        open_chat(ChatConfig(template=True), tokenizers.characters())
    chat = open_chat(ChatConfig(), tokenizers.characters())
    assert chat.render("7 3 -> 4:") == "7 3 -> 4:"
    np.testing.assert_array_equal(chat.encode("7 3 -> 4:"), chat.tokenizer.encode("7 3 -> 4:"))


def test_the_tokenizers_fingerprint_is_about_ids(tmp_path):
    prints = {tokenizers.load(save(tmp_path / str(i), Manner(t, "<s>"))).fingerprint() for i, t in enumerate([R1, LLAMA3, None])}
    assert len(prints) == 1
