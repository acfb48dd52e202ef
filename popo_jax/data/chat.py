"""Chats: a problem's text as the policy reads it, in the tokenizer's chat template or as it is.

A template is a program in jinja that came with a checkpoint: it runs in a sandbox, in the environment that transformers'
apply_chat_template gives it, and renders what that renders.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.meta
import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from popo_jax.config import ChatConfig
from popo_jax.data.tokenizer import Tokenizer
from popo_jax.model_config import VisionConfig
from popo_jax.types import UserError

MARK = "\ue0a7"
"""A private character that finds its place in what was rendered."""
PICTURE = "<image>"
"""In a problem's text, where one of its images stands."""
READ = {"thinking": "enable_thinking", "date": "strftime_now"}
"""Settings that a template may read, by the names it has for them."""


@dataclass(frozen=True, eq=False)
class Chat:
    c: ChatConfig
    tokenizer: Tokenizer
    template: jinja2.Template | None
    """None: prompts are the problems as they are."""
    vision: VisionConfig | None = None
    """Of a policy that sees."""

    def render(self, problem: str, *, images: bool = False) -> str:
        """What the policy reads; images: PICTURE is where one stands. Errors: UserError if the template raises."""
        if self.template is not None:
            return self.fill(problem, self.c.system, images=images) + self.c.prefix
        return (problem.replace(PICTURE, self._picture()) if images else problem) + self.c.prefix

    def _picture(self) -> str:
        """The text of an image's tokens, one for all of its cells."""
        assert self.vision is not None
        ids = [i for i in (self.vision.start_token, self.vision.image_token, self.vision.end_token) if i is not None]
        return "".join(self.tokenizer.core.id_to_token(i) or "" for i in ids)

    def begun(self, problem: str, *, images: bool = False) -> str:
        """What of the response stands in `render(problem)`: thinking that the template opened below the problem, the prefix."""
        if self.template is None:
            return self.c.prefix
        _, mark, below = self.fill(problem + MARK, self.c.system, images=images).rpartition(MARK)
        at = below.rfind("<think>") if mark else -1
        return (below[at:] if at > below.rfind("</think>") else "") + self.c.prefix

    def encode(self, text: str) -> np.ndarray:
        """int32 [n] of a rendered text. A template writes special tokens itself, around any other text the tokenizer does."""
        return self.tokenizer.encode(text, special=self.template is None)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.tokenizer.encode_all(texts, special=self.template is None)

    def fill(self, problem: str, system: str | None, *, images: bool = False) -> str:
        """The template around these messages, up to where the response begins."""
        assert self.template is not None
        messages: list[dict[str, Any]] = [{"role": "user", "content": _content(problem) if images else problem}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        values: dict[str, Any] = {**self.tokenizer.named, "tools": None, "documents": None, "add_generation_prompt": True}
        if self.c.thinking is not None:
            values["enable_thinking"] = self.c.thinking
        try:
            return self.template.render(messages=messages, **values)
        except Exception as e:  # it may raise anything
            given = " and ".join(m["role"] for m in messages)
            raise UserError(
                f"the chat template of {self.tokenizer.where} must render a {given} message, got {type(e).__name__}: "
                f"{' '.join(str(e).split())}"
            ) from e


def _content(problem: str) -> list[dict[str, str]]:
    """As templates of policies that see take it: pieces of text, and an image for each mark between them."""
    out: list[dict[str, str]] = []
    for i, text in enumerate(problem.split(PICTURE)):
        out += [{"type": "image"}] if i else []
        out += [{"type": "text", "text": text}] if text else []
    return out


def open_chat(c: ChatConfig, tokenizer: Tokenizer, vision: VisionConfig | None = None) -> Chat:
    """Errors: UserError for a template that is wanted and missing, or broken, and for a setting that it does not read."""
    wanted, where = tokenizer.template if c.template is not False else None, tokenizer.where
    if wanted is None:
        if c.template:
            raise UserError(f"chat.template: {where} must have a chat template, got none")
        given = [k for k in ("system", *READ) if getattr(c, k) is not None] if c.template is None else []
        if given:
            raise UserError(f"chat.{given[0]} goes with a chat template, {where} has none; got {getattr(c, given[0])!r}")
        return Chat(c, tokenizer, None, vision)
    reads = _reads(tokenizer)
    for key, name in READ.items():
        if getattr(c, key) is not None and name not in reads:
            raise UserError(f"chat.{key} must be null: the chat template of {where} has no {name}, got {getattr(c, key)!r}")
    chat = Chat(c, tokenizer, _environment(c.date).from_string(wanted), vision)
    if MARK not in chat.fill(MARK, c.system):
        raise UserError(
            f"the chat template of {where} must write the user's message as it is, got {chat.fill('?', c.system)!r} for '?'"
        )
    if c.system is not None and MARK not in chat.fill("?", c.system + MARK):
        raise UserError(f"chat.system must be null: the chat template of {where} leaves it out, got {c.system!r}")
    return chat


def dated(c: ChatConfig, tokenizer: Tokenizer) -> ChatConfig:
    """With the day of today, if the template asks for one and none is given. Errors: UserError for a broken template."""
    if c.date is not None or c.template is False or READ["date"] not in _reads(tokenizer):
        return c
    return replace(c, date=datetime.now().date().isoformat())


def _reads(tokenizer: Tokenizer) -> set[str]:
    """Names that its template looks up. Errors: UserError if it is no jinja."""
    environment = _environment(None)
    del environment.globals[READ["date"]]  # what is global is not listed
    try:
        return jinja2.meta.find_undeclared_variables(environment.parse(tokenizer.template or ""))
    except jinja2.TemplateSyntaxError as e:
        raise UserError(f"the chat template of {tokenizer.where} must be jinja, got line {e.lineno}: {e.message}") from e


def _environment(day: str | None) -> ImmutableSandboxedEnvironment:
    """That of transformers (utils/chat_template_utils.py); `day` is what strftime_now tells, None: now."""

    def strftime_now(format: str) -> str:
        return (datetime.now() if day is None else datetime.fromisoformat(day)).strftime(format)

    out = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    out.filters["tojson"] = _tojson
    out.globals |= {"raise_exception": _raise, "strftime_now": strftime_now}
    return out


class Generation(Extension):
    """{% generation %} ... {% endgeneration %} tells what an assistant said; it is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        return caller()


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without jinja's HTML escapes."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
