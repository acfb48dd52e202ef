"""Runs of a policy with a chat template: its prompts, what is written down, what a resume and an evaluation make of it."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import jax
import pyarrow.parquet as pq
import pytest
import yaml

import popo_jax.policy as policies
from popo_jax import cli, exam, launch
from popo_jax.data import chat as chats
from popo_jax.data import tokenizer as tokenizers
from popo_jax.eval_args import EvalArgs
from popo_jax.policy import Policy
from tests import chatty, tiny
from tests.killable import lucky


@pytest.fixture(autouse=True)
def _luck(monkeypatch):
    monkeypatch.setattr(launch, "Graders", lucky)
    monkeypatch.setattr(exam, "Graders", lucky)


def checkpoint(folder: Path, manner: str) -> Path:
    tokenizer = tokenizers.load(chatty.save(folder, chatty.MANNERS[manner]))
    built = tiny.built(tiny.config(), tokenizer)
    policies.save(folder, Policy(built.model.c, tokenizer), tiny.sharp(built.fresh_params(jax.random.key(0)), 8.0))
    return folder


def train(folder: Path, run: Path, *args: str) -> int:
    data = tiny.BASE | {"steps": 1, "policy": {"path": str(folder)}, "sample": tiny.BASE["sample"] | {"max_prompt_tokens": 120}}
    del data["warm_start"], data["model"]
    (run.parent / "c.yaml").write_text(yaml.safe_dump(data))
    return cli.main(["train", str(run.parent / "c.yaml"), "--run-dir", str(run), *args])


def prompts(run: Path, step: int = 1) -> set[str]:
    return set(pq.read_table(run / "samples" / f"{step:06d}.parquet")["prompt"].to_pylist())


def asked(folder: Path) -> set[str]:
    return {json.loads(line)["prompt"] for line in (folder / "answers.jsonl").read_text().splitlines()}


def test_a_run_and_its_evaluation_read_the_same_prompts_and_a_resume_with_others_is_refused(tmp_path, capsys):
    run = tmp_path / "run"
    assert train(checkpoint(tmp_path / "policy", "r1"), run, "--chat.system", "Reason.", "--chat.prefix", "So ") == 0
    before, after = chatty.r1("|", "Reason.").split("|")
    assert all(p.startswith(before) and p.endswith(":" + after + "So ") for p in prompts(run))
    kept = yaml.safe_load((run / "config.yaml").read_text())["chat"]
    assert kept == {"template": None, "system": "Reason.", "thinking": None, "date": None, "prefix": "So "}
    for other in (["--chat.system", "Think."], ["--chat.prefix", "Thus "], ["--chat.template", "False"]):
        capsys.readouterr()
        assert cli.main(["train", "--resume", str(run), "--steps", "2", *other]) == 2
        err = capsys.readouterr().err
        assert "was written with another template" in err or "is not read" in err
    assert cli.main(["eval", str(run), "--problems", "2", "--k", "1", "--greedy", "False", "--out", str(tmp_path / "out")]) == 0
    assert all(p.startswith(before) and p.endswith(":" + after + "So ") for p in asked(tmp_path / "out"))
    for given in (["--system", "x"], ["--template", "False"], ["--thinking", "True"], ["--prefix", "x"]):
        capsys.readouterr()
        assert cli.main(["eval", str(run), *given]) == 2
        assert f"{given[0]} goes with a checkpoint, {run} is a run: it has its own" in capsys.readouterr().err


def test_a_run_keeps_the_day_it_was_started(tmp_path, monkeypatch):
    def on(year: int) -> None:
        clock = type("Clock", (datetime,), {"now": classmethod(lambda cls: datetime(year, 1, 2, 3, 4))})
        monkeypatch.setattr(chats, "datetime", clock)

    run = tmp_path / "run"
    on(2026)
    assert train(checkpoint(tmp_path / "policy", "llama3"), run) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["chat"]["date"] == "2026-01-02"
    on(2031)
    assert cli.main(["train", "--resume", str(run), "--steps", "2"]) == 0
    for step in (1, 2):
        assert all("Today Date: 02 Jan 2026\n" in p for p in prompts(run, step))


def test_a_checkpoint_is_asked_as_the_options_say(tmp_path, capsys):
    folder, said = checkpoint(tmp_path / "policy", "qwen3"), {}
    for name, given in {
        "plain": {},
        "raw": {"template": False, "prefix": "="},
        "full": {"system": "Be brief.", "thinking": False, "prefix": "So "},
    }.items():
        a = EvalArgs(str(folder), task=("countdown",), problems=1, **given)
        (prompt,) = exam.open_exams(a, exam.open_subject(a))[0].prompts
        said[name] = prompt.text
    problem = said["raw"].removesuffix("=")
    assert problem.endswith(":")
    assert said["plain"] == f"<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
    assert said["full"] == f"<|im_start|>system\nBe brief.<|im_end|>\n{said['plain']}<think>\n\n</think>\n\nSo "
    assert cli.main(["eval", str(folder), "--task", "countdown", "--template", "False", "--system", "x"]) == 2
    assert "--system and --thinking go with a chat template, got --template False" in capsys.readouterr().err


def test_settings_that_go_with_a_template_want_one(tmp_path, capsys):
    for given, says in (
        (["--chat.template", "True"], "chat.template: the tokenizer must have a chat template, got none"),
        (["--chat.system", "x"], "chat.system goes with a chat template, the tokenizer has none; got 'x'"),
        (["--chat.template", "False", "--chat.thinking", "True"], "chat.thinking is not read: chat.template is false"),
        (["--chat.date", "2 January"], "chat.date must be a day as YYYY-MM-DD, got '2 January'"),
    ):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny.BASE))
        capsys.readouterr()
        assert cli.main(["train", str(tmp_path / "c.yaml"), "--run-dir", str(tmp_path / "run"), *given]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
