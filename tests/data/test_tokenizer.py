from __future__ import annotations

import json

import numpy as np
import pytest

from popo_jax.data import tokenizer as tokenizers
from popo_jax.types import UserError

ASCII = "".join(map(chr, range(32, 127))) + "\n"


def test_characters_go_there_and_back():
    t = tokenizers.characters()
    assert t.vocab_size == 99 and t.encode("9 6 -> 7:").tolist() == [29, 4, 26, 4, 17, 34, 4, 27, 30]
    assert t.decode(t.encode(ASCII)) == ASCII and len(t.encode(ASCII)) == len(ASCII)
    assert t.encode("a\u00e9b").tolist()[0::3] == [t.encode("a")[0], t.encode("b")[0]] and 2 in t.encode("\u00e9")
    assert t.decode(np.array([29, *t.eos_ids])) == "9"


def test_the_end_token_cannot_be_written_by_a_prompt_of_plain_text():
    t = tokenizers.characters()
    assert len(t.encode("<eo s>")) == 6


def test_save_and_load_agree_and_so_do_fingerprints(tmp_path):
    t = tokenizers.characters()
    t.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    got = tokenizers.load(tmp_path)
    assert got.eos_ids == (1, 2) and got.pad_id == t.pad_id and got.fingerprint() != t.fingerprint()
    (tmp_path / "generation_config.json").unlink()
    assert tokenizers.load(tmp_path).fingerprint() == t.fingerprint()
    np.testing.assert_array_equal(got.encode(ASCII), t.encode(ASCII))


def test_transformers_reads_the_same_ids(tmp_path):
    transformers = pytest.importorskip("transformers")
    t = tokenizers.characters()
    t.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    np.testing.assert_array_equal(theirs(ASCII)["input_ids"], t.encode(ASCII))
    assert theirs.decode(t.encode(ASCII)) == ASCII
    assert (theirs.eos_token_id, theirs.pad_token_id) == (t.eos_ids[0], t.pad_id)


def test_a_broken_or_missing_tokenizer_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json must be a fast tokenizer's file"):
        tokenizers.load(tmp_path)
    tokenizers.characters().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no end token"):
        tokenizers.load(tmp_path)
