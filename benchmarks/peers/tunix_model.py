"""The policy and its tokenizer as Tunix loads them from the inputs' folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2 import params

from benchmarks.peers import case

PACKAGES = ("google-tunix", "jax", "jaxlib", "flax", "transformers")


def load(inputs: Path, mesh: jax.sharding.Mesh) -> qwen2.Qwen2:
    m = case.MODEL
    c = qwen2.ModelConfig(
        num_layers=m["layers"],
        vocab_size=m["vocab_size"],
        embed_dim=m["width"],
        hidden_dim=m["mlp"],
        num_heads=m["heads"],
        head_dim=m["head_dim"],
        num_kv_heads=m["kv_heads"],
        rope_theta=10_000,
        norm_eps=1e-6,
        use_tied_embedding=m["tie_embeddings"],
    )
    return params.create_model_from_safe_tensors(str(inputs / "policy"), c, mesh, dtype=jnp.float32)


def mesh() -> jax.sharding.Mesh:
    """All devices, with the axes that Tunix's shardings name."""
    return jax.make_mesh((jax.device_count(), 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def texts_and_tokenizer(inputs: Path) -> tuple[list[str], Any]:
    """Errors: ValueError for a tokenizer that reads a prompt differently than it was written."""
    tokens = np.load(inputs / "prompts.npy").tolist()
    tokenizer = AutoTokenizer.from_pretrained(inputs / "policy")
    texts = case.texts(tokens)
    if tokenizer(texts[0]).input_ids != tokens[0]:
        raise ValueError(f"the first prompt must be {tokens[0]}, got {tokenizer(texts[0]).input_ids}")
    return texts, tokenizer
