"""Tunix's sampler, case `sample`: temperature 1 over the whole vocabulary, a cache of exactly the row's length."""

from __future__ import annotations

import itertools

import numpy as np
from tunix.generate.sampler import CacheConfig, Sampler

from benchmarks.peers import case, tunix_model
from benchmarks.peers.worker import Gate, serve


def main() -> None:
    gate = Gate(tunix_model.PACKAGES)
    model = tunix_model.load(gate.inputs, tunix_model.mesh())
    texts, tokenizer = tunix_model.texts_and_tokenizer(gate.inputs)
    m = case.MODEL
    sampler = Sampler(model, tokenizer, CacheConfig(case.PROMPT + case.RESPONSE, m["layers"], m["kv_heads"], m["head_dim"]))
    seeds = itertools.count()

    def step() -> int:
        out = sampler(
            texts[: case.SAMPLE_ROWS],
            max_generation_steps=case.RESPONSE,
            max_prompt_length=case.PROMPT,
            temperature=1.0,
            top_p=1.0,
            seed=next(seeds),
        )
        gate.facts["distinct"] = len(np.unique(np.concatenate(out.tokens)))
        return sum(map(len, out.tokens))

    serve(gate, step)


if __name__ == "__main__":
    main()
