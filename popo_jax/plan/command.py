"""`popo plan CONFIG --topology v5p:4x4x8`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

from etils import epath
from rich.console import Console

from popo_jax.config import Config
from popo_jax.data.tokenizer import characters
from popo_jax.model_config import ModelConfig
from popo_jax.models import hf_config
from popo_jax.models.hub import locate
from popo_jax.plan import report, search


def command(c: Config, topology: str, *, shape: str | None, as_json: bool) -> None:
    """Plan and print; what is under way goes to stderr."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    p = search.plan(c, _shape(c, shape), topology, say)
    if as_json:
        print(json.dumps(report.as_json(p), indent=2))
    else:
        report.show(p, Console(width=140) if not sys.stdout.isatty() else Console())


def _shape(c: Config, shape: str | None) -> ModelConfig:
    """Of `shape`, a config.json or its folder; else of the config's policy; else the config's own."""
    if shape is not None:
        path = epath.Path(shape)
        return hf_config.read_config(path.parent if path.name == "config.json" else path)
    if c.policy.path is not None:
        return hf_config.read_config(locate(c.policy.path))
    return c.model if c.model.vocab_size is not None else replace(c.model, vocab_size=characters().vocab_size)
