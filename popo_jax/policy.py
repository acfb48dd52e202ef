"""The policy a run starts from: a folder in Hugging Face's format, given or made by the warm start."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

from etils import epath

from popo_jax.config import Config
from popo_jax.data import tokenizer as tokenizers
from popo_jax.data.tokenizer import Tokenizer
from popo_jax.model_config import MODEL_HOW, ModelConfig, VisionConfig
from popo_jax.models import hf, hf_config, lora, vision_config
from popo_jax.models.json_files import read_json, write_json
from popo_jax.task_config import PICTURED
from popo_jax.types import UserError

ENDS = 2**20
"""Bytes of a file's beginning and end that its digest reads."""
COPIED = (".json", ".jinja", ".txt", ".model")
"""Endings of a checkpoint's files besides weights."""


@dataclass(frozen=True, eq=False)
class Policy:
    """What stays of a policy when its weights are left out."""

    model: ModelConfig
    tokenizer: Tokenizer
    folder: epath.Path | None = None
    """Where its files lie, which `save` copies; None: made here."""


def describe(folder: epath.PathLike, c: Config) -> Policy:
    """Shape and tokenizer of a checkpoint folder; precision and scheduling as `c.model` says."""
    folder = epath.Path(folder)
    how = {name: getattr(c.model, name) for name in MODEL_HOW}
    shape = replace(hf_config.read_config(folder), **how)
    shape = replace(shape, vision=scaled(shape.vision, c))
    if shape.max_positions < c.row_tokens:
        raise UserError(
            f"sample.max_prompt_tokens + sample.max_response_tokens must be at most the {shape.max_positions} positions that "
            f"{folder} was made for, got {c.row_tokens}"
        )
    return checked(Policy(shape, tokenizers.load(folder), folder), f"{folder}: vocab_size")


def scaled(v: VisionConfig, c: Config) -> VisionConfig:
    """With `images.min_pixels` and `max_pixels` where they are given. Errors: UserError if nothing lies between them."""
    given = {k: n for k in ("min_pixels", "max_pixels") if (n := getattr(c.images, k)) is not None}
    v = replace(v, **given)
    if v.min_pixels > v.max_pixels:
        raise UserError(f"images.max_pixels must be at least images.min_pixels ({v.min_pixels}), got {v.max_pixels}")
    return v


def with_limits(c: Config, v: VisionConfig) -> Config:
    """With `images.min_pixels` and `max_pixels` as images are scaled, if a task has any: a resumed run must go on with them."""
    if not any(t.name in PICTURED for t in c.tasks):
        return c
    return replace(c, images=replace(c.images, min_pixels=v.min_pixels, max_pixels=v.max_pixels))


def checked(policy: Policy, what: str) -> Policy:
    """The policy. Errors: UserError if its tokenizer has ids that its embedding has not."""
    size, needed = policy.model.vocab_size, policy.tokenizer.vocab_size
    if size is None or size < needed:
        raise UserError(f"{what} must hold the tokenizer's {needed} ids, got {size}")
    return policy


def lacks(policy: Policy, c: Config) -> list[str]:
    """A sentence for each thing that a loaded policy's tokenizer does not have, and what is done without it."""
    t = policy.tokenizer
    said: list[str] = []
    if c.policy.path is None:
        return said
    if t.core.token_to_id(t.named.get("pad_token", "")) is None:
        said.append(f"{t.where} names no pad token: none is needed, what fills up a row is never read")
    if t.template is None and c.chat.template is None:
        said.append(
            f"{t.where} has no chat template: problems are asked as they are (chat.template false says so, true refuses it)"
        )
    return said


def save(folder: epath.PathLike, policy: Policy, params: dict[str, Any] | None) -> None:
    """A folder that transformers opens, adapters merged; without `params` it has everything but weights.

    Configs, tokenizer and chat template of a loaded policy are copied as they are, but for the weights' dtype and the limits
    that images are scaled to.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if policy.folder is not None:
        _copy(policy.folder, folder, policy.model)
    else:
        hf_config.save_config(folder, policy.model, eos_ids=policy.tokenizer.eos_ids, pad_id=policy.tokenizer.pad_id)
        policy.tokenizer.save(folder)
    if params is not None:
        c = policy.model
        hf.save_weights(folder, lora.merge(params, c), lora.without(c))


def digest(folder: epath.PathLike) -> str:
    """16 hex digits that tell checkpoints apart: of config.json, and of both ends of every file of weights."""
    hashed = hashlib.sha256()
    for file in sorted(p for p in epath.Path(folder).iterdir() if p.name == "config.json" or p.suffix == ".safetensors"):
        with file.open("rb") as f:
            hashed.update(f"{file.name} {file.stat().length}".encode() + f.read(ENDS))
            f.seek(max(file.stat().length - ENDS, 0))
            hashed.update(f.read(ENDS))
    return hashed.hexdigest()[:16]


def _copy(source: epath.Path, folder: epath.Path, c: ModelConfig) -> None:
    for file in source.iterdir():
        if file.suffix in COPIED and not file.name.endswith(".index.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    config = read_json(folder / "config.json")
    config.pop("dtype", None)  # transformers 5's name; the other is read by all
    write_json(folder / "config.json", config | {"torch_dtype": c.param_dtype})
    if c.sees:
        vision_config.write_limits(folder, c)
