"""transformers' `generate`, case `sample`: the default dynamic cache and attention (sdpa), no top-k, no end token.

What the documentation names for speed besides, a static cache with torch.compile, is a contestant of its own.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.peers import case
from benchmarks.peers.worker import Gate, serve


def main(cache: str | None) -> None:
    gate = Gate(("torch", "transformers"))
    model = AutoModelForCausalLM.from_pretrained(gate.inputs / "policy", dtype=torch.float32).eval()
    model.generation_config = GenerationConfig()  # the folder's own names an end token and is greedy
    length = case.RESPONSE
    settings = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length, pad_token_id=0)
    settings.cache_implementation = cache
    ids = torch.from_numpy(np.load(gate.inputs / "prompts.npy")[: case.SAMPLE_ROWS].astype(np.int64))
    if cache == "static":
        model.forward = torch.compile(model.forward)
    gate.facts |= {"threads": torch.get_num_threads(), "attention": model.config._attn_implementation}

    def step() -> int:
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        response = out[:, case.PROMPT :]
        gate.facts["distinct"] = len(response.unique())
        return response.numel()

    serve(gate, step)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cache")
    main(parser.parse_args().cache)
