"""Writes what every contestant reads: the policy as a Hugging Face folder, prompts, and one batch to train on.

FOLDER/policy/                 config, weights, tokenizer
FOLDER/prompts.npy             int32 [n, PROMPT], printable characters
FOLDER/batch.npz               tokens int32, mask bool, logp_old float32 [TRAIN_ROWS, T]; adv float32 [TRAIN_ROWS]
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from benchmarks.peers import case
from popo_jax.model_config import ModelConfig
from popo_jax.models import hf
from popo_jax.models.decoder import Decoder
from popo_jax.ops.logprobs import next_token_logprobs

SEED = 0
PROMPTS = 1024
DRIFT = 0.1
"""Standard deviation of logp_old around the policy's own log-probs: ratios differ from 1, some are clipped."""


def write(folder: Path) -> None:
    """All of it; the same bytes for the same versions of jax and numpy."""
    rng = np.random.default_rng(SEED)
    c = ModelConfig(**case.MODEL)
    model = Decoder(dataclasses.replace(c, linear="plain", attention="xla"))
    params = jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(SEED)))
    hf.save(folder / "policy", params, c, eos_ids=(case.EOS,), pad_id=case.PAD)
    _save_tokenizer(folder / "policy")
    for name in ("config.json", "generation_config.json"):  # transformers wants a model's special tokens inside its vocabulary
        path = folder / "policy" / name
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if not k.endswith("_token_id")}))
    np.save(folder / "prompts.npy", rng.integers(33, 127, (PROMPTS, case.PROMPT)).astype(np.int32))
    tokens = rng.integers(0, 128, (case.TRAIN_ROWS, case.PROMPT + case.RESPONSE)).astype(np.int32)
    logp = np.asarray(jax.jit(lambda p, t: next_token_logprobs(model.logits(p, t), t, temperature=1.0))(params, tokens))
    mask = np.broadcast_to(np.arange(tokens.shape[1]) >= case.PROMPT, tokens.shape)
    old = np.where(mask, logp + DRIFT * rng.standard_normal(logp.shape), 0).astype(np.float32)
    adv = rng.standard_normal(case.TRAIN_ROWS).astype(np.float32)
    np.savez(folder / "batch.npz", tokens=tokens, mask=mask, logp_old=old, adv=adv)


def _save_tokenizer(folder: Path) -> None:
    """Byte-level BPE without merges: the id of an ASCII character is its code."""
    visible = [b for b in range(128) if 33 <= b <= 126]
    spelled = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(b for b in range(128) if b not in visible)}
    core = tokenizers.Tokenizer(models.BPE({spelled[b]: b for b in range(128)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<eos>", "<pad>"])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "add_prefix_space": False,
    }
    (folder / "tokenizer.json").write_text(core.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
