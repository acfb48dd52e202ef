from __future__ import annotations

import huggingface_hub
import pytest
from etils import epath

from popo_jax.models.hub import locate
from popo_jax.types import UserError


def test_what_is_there_is_taken_and_paths_never_ask_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    for name in ("org/name", str(tmp_path / "org" / "name"), "./no/such", "/no/such", "gs://bucket/name", "no-such", "a/b/c"):
        assert locate(name) == epath.Path(name)


def test_a_name_of_the_hub_is_fetched_without_other_formats(tmp_path, monkeypatch):
    asked = {}

    def download(repo, *, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert str(locate("Qwen/Qwen2.5-0.5B@abc")) == str(tmp_path)
    assert (asked["repo"], asked["revision"]) == ("Qwen/Qwen2.5-0.5B", "abc")
    assert "*.safetensors" in asked["patterns"] and "*.bin" not in asked["patterns"]


def test_what_is_nowhere_is_told_in_one_sentence(monkeypatch):
    def download(*a, **k):
        raise OSError("no network\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=r"^policy\.path must be .*, got org/none: no such folder, and no network$"):
        locate("org/none")
