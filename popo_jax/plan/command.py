"""`popo plan CONFIG --topology v5p:4x4x8`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace

from etils import epath
from rich.console import Console

import popo_jax.policy as policies
from popo_jax.config import Config
from popo_jax.data.tokenizer import VISION, characters
from popo_jax.model_config import ModelConfig
from popo_jax.models import hf_config
from popo_jax.models.hub import locate
from popo_jax.plan import report, search
from popo_jax.task_config import PICTURED

MARGIN = 1.25
"""Times the windows that an image would fill if its sides were whole windows."""


def command(c: Config, topology: str, *, shape: str | None, as_json: bool) -> None:
    """Plan and print; what is under way goes to stderr."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    model = _shape(c, shape)
    p = search.plan(_with_images(c, model, say), model, topology, say)
    if as_json:
        print(json.dumps(report.as_json(p), indent=2))
    else:
        report.show(p, Console(width=140) if not sys.stdout.isatty() else Console())


def _with_images(c: Config, model: ModelConfig, say: Callable[[str], None]) -> Config:
    """With the sizes of images, which training takes from its data, as large as `images.max_pixels` and the prompt allow."""
    if not model.sees or not any(t.name in PICTURED for t in c.tasks) or (c.images.max_tokens and c.images.max_windows):
        return c
    v = policies.scaled(model.vision, c)
    tokens = c.images.max_tokens or min(v.max_pixels // v.cell**2, c.sample.max_prompt_tokens)
    windows = c.images.max_windows or math.ceil(MARGIN * tokens / v.window_cells**2)
    say(f"planned for images of {tokens} tokens and {windows} windows a prompt (images.max_tokens, images.max_windows)")
    return replace(c, images=replace(c.images, max_tokens=tokens, max_windows=windows))


def _shape(c: Config, shape: str | None) -> ModelConfig:
    """Of `shape`, a config.json or its folder; else of the config's policy; else the config's own."""
    if shape is not None:
        path = epath.Path(shape)
        return hf_config.read_config(path.parent if path.name == "config.json" else path)
    if c.policy.path is not None:
        return hf_config.read_config(locate(c.policy.path))
    tokenizer = characters(sees=c.model.sees)
    model = c.model if c.model.vocab_size is not None else replace(c.model, vocab_size=tokenizer.vocab_size)
    image = tokenizer.core.token_to_id(VISION[1]) if c.model.sees else None
    return replace(model, vision=replace(model.vision, image_token=image))
