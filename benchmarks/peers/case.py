"""What is compared: the model, the three cases and their sizes. Standard library only: every contestant imports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MODEL: Mapping[str, Any] = {
    "layers": 6,
    "width": 256,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "mlp": 768,
    "vocab_size": 128,
    "tie_embeddings": True,
}
"""4.8 M parameters, float32; the tokens are the 128 ASCII characters."""
EOS, PAD = 128, 129
"""Ids of the tokenizer beyond the model's vocabulary: nobody can draw them, so no response ends early."""

PROMPT, RESPONSE = 32, 64
"""Tokens of every prompt and of every response."""
SAMPLE_ROWS = 64
"""Case `sample`: that many different prompts, one response each, temperature 1."""
PROMPTS, GROUP = 16, 8
"""Case `step`: a whole trainer's step on PROMPTS x GROUP responses: sample, reward, advantages, update."""
TRAIN_ROWS = PROMPTS * GROUP
"""Case `train`: that many rows of PROMPT + RESPONSE tokens, GRPO loss on the responses, forward, backward, clip, AdamW."""

LEARNING_RATE, B1, B2, EPS, GRAD_CLIP = 1e-4, 0.9, 0.999, 1e-8, 1.0
CLIP = 0.2
AGREE = 1e-4
"""How far apart they may be: absolute for the loss, relative for the norm."""

REWARDED = frozenset("aeiou")


def reward(text: str) -> float:
    """Share of vowels: trivial, and different in nearly every response."""
    return sum(ch in REWARDED for ch in text) / RESPONSE


def texts(prompts: Sequence[Sequence[int]]) -> list[str]:
    """Prompts as text: a token's id is its character's code."""
    return ["".join(map(chr, row)) for row in prompts]
