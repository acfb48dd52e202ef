"""Makes tests/golden/qwen2_*.npz with transformers (needs torch): config, weights, tokens and logits of small random Qwen2.

    python -m tests.golden.make_qwen2

Weights are rounded to float16, so that half the bytes hold them exactly; biases and norms are random too, and large
enough that logits are of order 1 to 10: a wrong layer does not hide below the tests' tolerance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

CASES: dict[str, dict[str, Any]] = {
    "tied": {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "untied": {"hidden_size": 20, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8, "rope_theta": 1e6},
    "odd": {"hidden_size": 28, "num_attention_heads": 7, "num_key_value_heads": 7, "rope_theta": 500.0, "rms_norm_eps": 1e-3},
}


def model(case: str) -> Any:
    """The case's Qwen2ForCausalLM, float32, in evaluation mode."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(sorted(CASES).index(case))
    settings = {"vocab_size": 31, "intermediate_size": 44, "num_hidden_layers": 3} | CASES[case]
    made = Qwen2ForCausalLM(Qwen2Config(**settings)).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            scale = 0.5 if "embed" in name or "bias" in name else 1.5 * p.shape[-1] ** -0.5
            p.copy_((torch.randn_like(p) * scale + (1.0 if "norm" in name else 0.0)).half().float())
    return made


def tokens() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 31, (3, 17)).astype(np.int32)


def logits(made: Any, ids: np.ndarray) -> np.ndarray:
    """[B, T, V] by transformers."""
    import torch

    with torch.no_grad():
        return made(torch.from_numpy(ids).long()).logits.numpy()


if __name__ == "__main__":
    for case in CASES:
        made, ids = model(case), tokens()
        weights = {k: v.detach().numpy().astype(np.float16) for k, v in made.named_parameters()}
        config = json.dumps(json.loads(made.config.to_json_string()))
        out = Path(__file__).with_name(f"qwen2_{case}.npz")
        np.savez_compressed(out, config=config, tokens=ids, logits=logits(made, ids), **weights)
        print(out, out.stat().st_size, "bytes, logits up to", np.abs(logits(made, ids)).max())
