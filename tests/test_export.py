"""What we export, transformers opens: the same tokens, the same greedy answers. `python -m tests.test_export RUN` too."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

import popo_jax.policy as policies
from popo_jax import cli, evaluate, export, launch, problems, restore, run_dir
from popo_jax.models import lora
from popo_jax.policy import Policy
from popo_jax.tasks.pool import grade_all
from tests import tiny
from tests.killable import lucky


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
    ours = evaluate.answer(r.state.params, prompts, greedy, r.policy.tokenizer.decode, grade_all, seed=0, version=r.step)
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
    ours = evaluate.answer(params, prompts, greedy, tiny.TOKENIZER.decode, grade_all, seed=0, version=0)
    assert len(set(ours.texts)) > 8
    assert transformers_greedy(tmp_path / "out", prompts, 8) == list(ours.texts)


def test_a_lora_run_is_exported_merged_and_as_an_adapter(tmp_path, monkeypatch):
    """From the command line: a base, three steps of POPO on its adapters, both exports; only the adapters have moved."""
    theirs, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(launch, "Graders", lucky)
    data = tiny.BASE | {"steps": 3, "policy": {"path": str(tmp_path / "base")}, "run_dir": str(tmp_path / "run")}
    data["model"] = {"lora": {"rank": 2}}
    shape = tiny.built(tiny.config())
    base = tiny.sharp(shape.fresh_params(jax.random.key(0)))
    policies.save(tmp_path / "base", Policy(shape.model.c, tiny.TOKENIZER), base)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(data))
    assert cli.main(["train", str(tmp_path / "c.yaml")]) == 0
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "adapter"), "--adapter"]) == 0
    r = restore.restore(tmp_path / "run", None)
    frozen = lora.split(r.state.params, r.policy.model)[1]
    jax.tree.map(np.testing.assert_array_equal, frozen, base)
    ids = np.arange(3, 15)[None]
    ours = r.built.model.logits(r.state.params, ids)
    adapted = theirs.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        for there in (adapted.eval(), AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()):
            np.testing.assert_allclose(there(torch.from_numpy(ids)).logits.numpy(), ours, atol=1e-4, rtol=0)
    assert np.abs(ours - shape.model.logits(base, ids)).max() > 1e-3
    assert cli.main(["train", "--resume", str(tmp_path / "run"), "--steps", "4"]) == 0


if __name__ == "__main__":
    a, b, differ = compare(run_dir.open_existing(sys.argv[1]).path, 512)
    print(f"solved greedily of 512: {a} here, {b} in transformers; {differ} answers differ")
