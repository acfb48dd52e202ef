"""What we export, transformers opens: the same tokens, the same greedy answers. `python -m tests.test_export RUN` too."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

import popo_jax.policy as policies
from popo_jax import evaluate, export, problems, restore, run_dir
from popo_jax.policy import Policy
from popo_jax.tasks.pool import grade_all
from tests import tiny


def transformers_greedy(folder: Path, prompts: list, limit: int) -> list[str]:
    """Greedy answers of an exported folder by transformers' own generate and tokenizer, left padded, 64 at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    texts = []
    for i in range(0, len(prompts), 64):
        ids = tokenizer([p.text for p in prompts[i : i + 64]], return_tensors="pt", padding=True)
        np.testing.assert_array_equal(ids["input_ids"][0][ids["attention_mask"][0] == 1], prompts[i].tokens)
        out = model.generate(**ids, max_new_tokens=limit, do_sample=False)
        texts += tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def compare(run: Path, n: int) -> tuple[int, int, int]:
    """(problems solved by our greedy decoding, by transformers', answers that differ) of n held-out ones."""
    r = restore.restore(run, None)
    prompts = evaluate.held_out(problems.load(r.c, r.policy.tokenizer).held_out, n)
    greedy = r.built.sampler(samples=1, temperature=0.0)
    ours = evaluate.answer(r.state.params, prompts, greedy, r.policy.tokenizer.decode, seed=0, version=r.step)
    with tempfile.TemporaryDirectory() as folder:
        export.export(run, Path(folder) / "out", None)
        texts = transformers_greedy(Path(folder) / "out", prompts, r.c.sample.max_response_tokens)
    theirs = grade_all([(p.task, t, p.answer) for p, t in zip(prompts, texts, strict=True)])
    differ = sum(a != b for a, b in zip(ours.texts, texts, strict=True))
    return int(ours.correct.sum()), int(sum(v.correct for v in theirs)), differ


def test_an_exported_policy_answers_the_same_in_transformers(tmp_path):
    """Random weights with opinions: greedy texts of 16 problems, to the character."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    c = tiny.config(sample__max_response_tokens=8)
    built = tiny.built(c)
    params = tiny.sharp(built.fresh_params(jax.random.key(0)), 8.0)
    policies.save(tmp_path / "out", Policy(built.model.c, tiny.TOKENIZER), params)
    prompts = evaluate.held_out(problems.load(c, tiny.TOKENIZER).held_out, 16)
    greedy = built.sampler(samples=1, temperature=0.0)
    ours = evaluate.answer(params, prompts, greedy, tiny.TOKENIZER.decode, seed=0, version=0)
    assert len(set(ours.texts)) > 8
    assert transformers_greedy(tmp_path / "out", prompts, 8) == list(ours.texts)


if __name__ == "__main__":
    a, b, differ = compare(run_dir.open_existing(sys.argv[1]).path, 512)
    print(f"solved greedily of 512: {a} here, {b} in transformers; {differ} answers differ")
