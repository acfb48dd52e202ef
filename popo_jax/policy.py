"""The policy a run starts from: a folder in Hugging Face's format, given or made by the warm start."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from etils import epath

from popo_jax.config import Config, ModelConfig
from popo_jax.data import tokenizer as tokenizers
from popo_jax.data.tokenizer import Tokenizer
from popo_jax.models import hf, hf_config
from popo_jax.types import UserError


@dataclass(frozen=True, eq=False)
class Policy:
    """What stays of a policy when its weights are left out."""

    model: ModelConfig
    tokenizer: Tokenizer


def describe(folder: epath.PathLike, c: Config) -> Policy:
    """Shape and tokenizer of a checkpoint folder; precision and scheduling as `c.model` says."""
    shape = hf_config.read_config(folder)
    how = {name: getattr(c.model, name) for name in ("dtype", "param_dtype", "remat", "linear")}
    return checked(Policy(replace(shape, **how), tokenizers.load(folder)), f"{folder}: vocab_size")


def checked(policy: Policy, what: str) -> Policy:
    """The policy. Errors: UserError if its tokenizer has ids that its embedding has not."""
    size, needed = policy.model.vocab_size, policy.tokenizer.vocab_size
    if size is None or size < needed:
        raise UserError(f"{what} must hold the tokenizer's {needed} ids, got {size}")
    return policy


def save(folder: epath.PathLike, policy: Policy, params: dict[str, Any] | None) -> None:
    """A folder that transformers opens; without `params` it has everything but weights."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    eos_ids, pad_id = policy.tokenizer.eos_ids, policy.tokenizer.pad_id
    if params is None:
        hf_config.save_config(folder, policy.model, eos_ids=eos_ids, pad_id=pad_id)
    else:
        hf.save(folder, params, policy.model, eos_ids=eos_ids, pad_id=pad_id)
    policy.tokenizer.save(folder)
