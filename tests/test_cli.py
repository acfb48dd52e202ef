"""Bad input on the command line: one clear sentence, exit 2, nothing lost. And the commands on a run that was made."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml

from popo_jax import cli, launch, plain
from popo_jax.config import PRESETS, from_dict, without_preset
from popo_jax.rules import resolve, unread
from popo_jax.types import UserError
from tests import tiny
from tests.killable import lucky


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny.BASE))
    return tmp_path / "c.yaml"


def refused(capsys, *args: object) -> str:
    """The one line that the command ends with."""
    assert cli.main([str(a) for a in args]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and len(err.splitlines()) == 1, err
    return err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--loss.clip-hgih", "0.2"], "unknown key loss.clip_hgih (did you mean loss.clip_high?)"),
        (["--loss.clip-low", "2"], "loss.clip_low must lie in (0, 1), got 2.0"),
        (["--batch.group-size", "1"], "batch.group_size must be at least 2"),
        (["--sample.top-p", "0.9"], "sample.top_p must be 1.0 with algorithm popo"),
        (["--sample.top-k", "5"], "sample.top_k must be off with algorithm popo"),
        (["--algorithm", "pop"], "algorithm must be one of grpo"),
        (["--algorithm", "grpo", "--replay.max-age", "3"], "replay.max_age is not read: algorithm grpo has no replay"),
        (["--replay.half-life", "3"], "replay.half_life is not read"),
        (["--replay.max-age", "3", "--replay.min-age", "4"], "replay.max_age must be at least replay.min_age (4), got 3"),
        (["--batch.mini-batches", "3"], "batch.mini_batches must divide batch.prompts (4), got 3"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--optim.learning-rate", "nan"], "optim.learning_rate must be above 0, got nan"),
        (["--sample.max-prompt-tokens", "5"], "must have a prompt of 1 to 5 tokens (sample.max_prompt_tokens)"),
        (["--policy.path", "/nowhere"], "/nowhere"),
        (["--model.vocab-size", "20"], "model.vocab_size must hold the tokenizer's 99 ids, got 20"),
        (["--seed", "99999999999999999999"], "must be below 2^32"),
        (["--algorithm", "grpo", "--weight.correct-sampler", "True", "--sample.top-p", "0.9"], "sample.top_p must be 1.0"),
        (["--from-step", "2"], "--from-step 2 goes with --resume RUN"),
        (["--mesh.tensor", "3"], "mesh: data x fsdp x tensor must be the number of devices"),
    ],
)
def test_bad_settings(config, capsys, tmp_path, args, says):
    assert says in refused(capsys, "train", config, "--run-dir", tmp_path / "run", *args)


def test_a_value_of_the_wrong_type(config, capsys):
    assert "Error parsing --steps: invalid literal for int()" in refused(capsys, "train", config, "--steps", "many")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must hold settings as a mapping, got nothing"),
        ("a: [1", "must be YAML"),
        ("algorithm: [popo]", "algorithm must be a name or a mapping, got ['popo']"),
        ("algorithm: {name: [1]}", "algorithm must be one of"),
        ("stepz: 3", "unknown key stepz (did you mean steps?)"),
        ("loss: {clip_low: high}", "loss.clip_low must be a number, got 'high'"),
        ("tasks: [{name: chess}]", "tasks.0.name must be one of countdown, arithmetic, math, geometry, got 'chess'"),
    ],
)
def test_bad_config_files(tmp_path, capsys, text, says):
    (tmp_path / "c.yaml").write_text(text)
    assert says in refused(capsys, "train", tmp_path / "c.yaml")


def test_missing_things(tmp_path, capsys):
    assert "expected a config file or --resume RUN" in refused(capsys, "train")
    assert "no such command (did you mean train?)" in refused(capsys, "trian")
    assert "must be a readable config file" in refused(capsys, "train", tmp_path / "no.yaml")
    assert "must be a run directory" in refused(capsys, "train", "--resume", tmp_path / "no")
    assert "must be a run directory" in refused(capsys, "inspect", tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.jsonl", '{"nums": [1, 2, 3], "target": 6}\n{"nums": [1, 2], "target": "x"}\n', "p.jsonl, line 2"),
        ("p.jsonl", "", "p.jsonl"),
        ("p.csv", "x", "p.csv"),
    ],
)
def test_bad_problem_files(config, capsys, tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    data = tiny.BASE | {"tasks": [{"name": "countdown", "train_file": str(tmp_path / name)}]}
    config.write_text(yaml.safe_dump(data))
    assert says in refused(capsys, "train", config, "--run-dir", tmp_path / "run")


def test_a_run_directory_below_a_file(config, capsys, tmp_path):
    assert "not a directory" in refused(capsys, "train", config, "--run-dir", config / "run")


def test_a_file_may_hold_what_the_algorithm_does_not_read(config):
    said: list[str] = []
    config.write_text(yaml.safe_dump(tiny.BASE | {"replay": {"max_age": 5}}))
    assert cli.parse_config(str(config), ["--algorithm", "grpo"], said.append).algorithm.name == "grpo"
    assert said == ["Not read with algorithm grpo: replay.max_age"]
    said.clear()
    cli.parse_config(str(config), [], said.append)
    assert said == []


def test_chat_settings_that_a_raw_prompt_does_not_read(config):
    said: list[str] = []
    config.write_text(yaml.safe_dump(tiny.BASE | {"chat": {"template": False, "system": "x", "thinking": True, "prefix": "="}}))
    assert cli.parse_config(str(config), [], said.append).chat.prefix == "="
    assert said == ["Not read with algorithm popo: chat.system, chat.thinking"]
    assert not [key for key in unread(tiny.config(chat__system="x")) if key.startswith("chat")]


def test_order_of_precedence(config):
    """defaults < preset < file < command line."""
    quiet = lambda _: None  # noqa: E731
    assert cli.parse_config(str(config), ["--algorithm", "popo-stale"], quiet).replay.min_age == 10
    config.write_text(yaml.safe_dump(tiny.BASE | {"replay": {"min_age": 7}}))
    assert cli.parse_config(str(config), ["--algorithm", "popo-stale"], quiet).replay.min_age == 7
    assert cli.parse_config(str(config), ["--algorithm", "popo-stale", "--replay.min-age", "6"], quiet).replay.min_age == 6
    assert cli.parse_config(str(config), ["--algorithm=popo-stale", "--replay.min-age=6"], quiet).replay.min_age == 6


def test_every_setting_has_a_flag_that_is_read(config):
    """Tasks, numbers and booleans too."""
    args = ["--tasks.0.countdown.high", "7", "--tasks.0.countdown.numbers", "3", "4", "--weight.correct-sampler", "True"]
    c = cli.parse_config(str(config), args, print)
    assert (c.tasks[0].countdown.high, c.tasks[0].countdown.numbers, c.weight.correct_sampler) == (7, (3, 4), True)


def test_presets_differ_from_each_other():
    configs = [resolve(from_dict({"algorithm": n})) for n in PRESETS]
    assert len({(c.algorithm.preset.slots, c.algorithm.preset.stores, c.algorithm.preset.order, c.algorithm.preset.marked_fresh,
                 c.algorithm.preset.around, c.replay) for c in configs}) == len(PRESETS) == 10  # fmt: skip
    with pytest.raises(UserError, match="did you mean popo-kl"):
        from_dict({"algorithm": "popo-lk"})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "c.yaml").write_text(yaml.safe_dump(tiny.BASE))
    patch = pytest.MonkeyPatch()
    patch.setattr(launch, "Graders", lucky)
    assert cli.main(["train", str(folder / "c.yaml"), "--run-dir", str(folder / "run")]) == 0
    patch.undo()
    return folder / "run"


def test_a_run_leaves_what_it_promises(run):
    names = {p.name for p in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "samples", "replays", "checkpoints", "policy", "summary.json"} <= names
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4]
    assert set(rows[0]) == {"step", "eval/accuracy", "eval/countdown/accuracy"}
    assert [r["step"] for r in rows if "eval/accuracy" in r] == [0, 2, 4]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"] and summary["rollouts_total"] == 64
    assert "fingerprints" in yaml.safe_load((run / "config.yaml").read_text())


def test_without_a_run_dir_runs_are_numbered(config, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "Graders", lucky)
    monkeypatch.chdir(tmp_path)
    for name in ("countdown-popo-s0", "countdown-popo-s0-2"):
        assert cli.main(["train", "c.yaml", "--steps", "2"]) == 0
        assert json.loads((tmp_path / "runs" / name / "summary.json").read_text())["finished"]
        assert cli.main(["inspect", f"runs/{name}"]) == 0


def test_its_config_repeats_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "Graders", lucky)
    assert cli.main(["train", str(run / "config.yaml"), "--run-dir", str(tmp_path / "again")]) == 0
    rows = [[json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, tmp_path / "again")]
    timeless = [
        [{k: v for k, v in row.items() if not k.startswith(("time/", "cpu/", "energy/"))} for row in part] for part in rows
    ]
    assert timeless[0] == timeless[1]


def test_a_directory_that_holds_a_run_is_refused_and_kept(run, config, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    assert "must be new or empty" in refused(capsys, "train", config, "--run-dir", run)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_export_eval_and_inspect(run, tmp_path, capsys):
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert "must not exist yet" in refused(capsys, "export", run, "--out", tmp_path / "out")
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert cli.main(["eval", str(copy), "--k", "1", "4", "--problems", "8"]) == 0
    said = capsys.readouterr().out
    assert "avg@4" in said and "greedy" in said
    (kept,) = (copy / "eval").iterdir()
    assert [len((kept / f).read_text().splitlines()) for f in ("greedy.jsonl", "answers.jsonl")] == [8, 8 * 4]
    assert cli.main(["inspect", str(copy)]) == 0
    assert "checkpoints" in capsys.readouterr().out
    assert "committed are 2, 4" in refused(capsys, "eval", copy, "--step", "3")
    assert "--problems must be at least 1, got -5" in refused(capsys, "eval", copy, "--problems", "-5")
    assert "--temperature must be above 0" in refused(capsys, "eval", copy, "--temperature", "0")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (["--sample.temperature", "0.9"], "was written with sample.temperature 1.0, which must stay, got 0.9"),
        (["--algorithm.advantages", "rloo"], "was written with algorithm.advantages grpo"),
        (["--sample.max-response-tokens", "5"], "sample.max_response_tokens 6, which must not be lowered, got 5"),
        (["--replay.capacity", "3"], "replay.capacity 16, which must not be lowered, got 3"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(run, capsys, monkeypatch, override, says):
    monkeypatch.setattr(launch, "Graders", lucky)
    before = (run / "metrics.jsonl").read_bytes()
    assert says in refused(capsys, "train", "--resume", run, *override)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_tokenizer_is_refused(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = copy / "policy" / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"]["A"], data["model"]["vocab"]["B"] = data["model"]["vocab"]["B"], data["model"]["vocab"]["A"]
    path.write_text(json.dumps(data))
    assert "was written with another tokenizer" in refused(capsys, "train", "--resume", copy, "--steps", "6")


def test_a_failed_start_leaves_no_directory(config, capsys, tmp_path):
    said = refused(capsys, "train", config, "--run-dir", tmp_path / "run", "--tasks.0.countdown.high", "1")
    assert "eval_problems" in said and not (tmp_path / "run").exists()


def test_a_runs_config_takes_another_presets_settings(run):
    quiet = lambda _: None  # noqa: E731
    c = cli.parse_config(str(run / "config.yaml"), ["--algorithm", "popo-stale"], quiet)
    assert (c.replay.min_age, c.replay.max_age, c.replay.capacity) == (10, 40, 64 * 4)
    assert cli.parse_config(str(run / "config.yaml"), [], quiet).replay.capacity == 16
    c = cli.parse_config(str(run / "config.yaml"), ["--algorithm", "popo-plus"], quiet)
    assert (c.replay.min_age, c.replay.capacity, c.replay.extra, c.slots) == (10, 64 * 4, 4, 8)
    assert (c.selection.method, c.selection.prior_mean) == ("mopps", "running")


def test_a_choice_that_no_preset_made_stays_with_another_preset(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"algorithm": "grpo", "selection": {"method": "mopps"}}))
    made = plain.to_plain(cli.parse_config(str(tmp_path / "c.yaml"), [], print))
    assert without_preset(made, "popo")["selection"]["method"] == "mopps"
    assert "method" not in without_preset(made, "popo-plus")["selection"]


@pytest.mark.parametrize("broken", ["- 1", "a: [", None])
def test_a_broken_config_in_a_run_is_one_sentence(run, tmp_path, capsys, broken):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "config.yaml").unlink()
    if broken is None:
        (copy / "config.yaml").mkdir()
    else:
        (copy / "config.yaml").write_text(broken)
    for command in (["inspect", copy], ["eval", copy], ["train", "--resume", copy]):
        assert "config.yaml must" in refused(capsys, *command)


@pytest.mark.parametrize("meta", ["{}", '{"format": 1}', '{"format": 9, "progress": {}, "fingerprints": {}, "settings": {}}'])
def test_a_checkpoint_whose_meta_lacks_parts_is_refused(run, tmp_path, capsys, meta):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "checkpoints" / "4" / "meta" / "metadata").write_text(meta)
    for command in (["train", "--resume", copy, "--steps", "6"], ["export", copy, "--out", tmp_path / "out"]):
        assert "checkpoints/4 must have a meta of format 1" in refused(capsys, *command)
    assert cli.main(["inspect", str(copy)]) == 0


@pytest.mark.parametrize(
    ("rows", "says"), [('{"a": 1}\n{"step": 9}\n', "line 1 must be a JSON row"), ("", "must hold the rows 0 to 4")]
)
def test_metrics_that_do_not_go_with_the_checkpoint_are_refused_and_kept(run, tmp_path, capsys, monkeypatch, rows, says):
    monkeypatch.setattr(launch, "Graders", lucky)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "metrics.jsonl").write_text(rows)
    assert says in refused(capsys, "train", "--resume", copy, "--steps", "6")
    assert (copy / "metrics.jsonl").read_text() == rows and (copy / "checkpoints" / "4").exists()


@pytest.mark.parametrize("eos", [[], ["x"], "x", -1, [9999], 1.5])
def test_end_tokens_that_are_no_ids_are_refused(run, tmp_path, capsys, eos):
    for name in ("generation_config.json", "config.json"):
        copy = tmp_path / name
        shutil.copytree(run, copy)
        for file in ("generation_config.json", name):
            path = copy / "policy" / file
            path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": eos}))
        assert "eos_token_id must name ids from 0 to 98" in refused(capsys, "export", copy, "--out", tmp_path / "out")


def test_a_stop_before_the_first_step_can_be_resumed(config, run, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "Graders", lucky)
    real = launch.evaluate.accuracy

    def stop(answers):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(answers)

    monkeypatch.setattr(launch.evaluate, "accuracy", stop)
    assert cli.main(["train", str(config), "--run-dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == 0
    monkeypatch.setattr(launch.evaluate, "accuracy", real)
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0
    resumed, whole = ([json.loads(x) for x in (r / "metrics.jsonl").read_text().splitlines()] for r in (tmp_path / "run", run))
    assert [(x["step"], x.get("loss")) for x in resumed] == [(x["step"], x.get("loss")) for x in whole]


def test_candidates_need_not_be_a_multiple_of_the_micro_batch(config, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "Graders", lucky)
    args = ["--algorithm", "popo-kl", "--replay.candidates", "7", "--batch.micro-batch", "8"]
    assert cli.main(["train", str(config), "--run-dir", str(tmp_path / "run"), *args]) == 0


def test_a_checkpoint_cut_short_is_refused_and_the_one_before_offered(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "Graders", lucky)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    replay = copy / "checkpoints" / "4" / "replay" / "replay.npz"
    replay.write_bytes(replay.read_bytes()[:-50])
    before = (copy / "metrics.jsonl").read_bytes()
    said = refused(capsys, "train", "--resume", copy, "--steps", "6")
    assert "checkpoints/4 cannot be read" in said and "--from-step 2" in said
    assert (copy / "metrics.jsonl").read_bytes() == before
    assert cli.main(["train", "--resume", str(copy), "--from-step", "2"]) == 0
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4] and any((copy / "discarded").iterdir())
    unbroken = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_equal(rows[-1]["loss"], unbroken[-1]["loss"])


def test_more_steps_can_be_asked_of_a_finished_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "Graders", lucky)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert cli.main(["train", "--resume", str(copy), "--steps", "5"]) == 0
    assert json.loads((copy / "summary.json").read_text())["step"] == 5


def test_a_run_on_word_problems_from_the_command_line(tmp_path, capsys):
    """Warm start, training, evaluation in the run, resumption and `popo eval`, all graded by worker processes."""
    task = {"name": "math", "math": {"train_problems": 64, "eval_problems": 16, "steps": 1, "high": 9, "instruction": ""}}
    c = {**tiny.BASE, "algorithm": "grpo", "tasks": [task], "sample": {"max_prompt_tokens": 64, "max_response_tokens": 12}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(c))
    assert cli.main(["train", str(tmp_path / "c.yaml"), "--run-dir", str(tmp_path / "run"), "--steps", "2"]) == 0
    assert cli.main(["train", "--resume", str(tmp_path / "run"), "--steps", "4"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4] and "eval/math/accuracy" in rows[-1]
    assert cli.main(["eval", str(tmp_path / "run"), "--problems", "4", "--k", "2"]) == 0
    assert "greedy" in capsys.readouterr().out
    mine = ["--tasks.0.verifier", "no_such_module:grade", "--run-dir", str(tmp_path / "other")]
    assert "the verifier of task math (no_such_module:grade) cannot be imported" in refused(
        capsys, "train", tmp_path / "c.yaml", *mine
    )


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_is_read_whole_and_names_its_hardware(path):
    said = []
    c = cli.parse_config(str(path), [], said.append)
    header = path.read_text().partition("\nalgorithm:")[0]
    assert not said and all(word in header for word in ("# Hardware ", "Time", f"popo train {path}"))
    assert c.rows // c.batch.mini_batches % (c.mesh.fsdp * c.mesh.tensor) == 0


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--batch.micro-batch", "foo", "no type matching {None}|INT|{auto} could be instantiated from ['foo']"),
        ("--model.attention", "foo", "Expected one of ('auto', 'xla', 'cudnn', 'splash')"),
        ("--optim.state-dtype", "float16", "Expected one of ('float32', 'bfloat16')"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_a_whole_sentence(flag, value, says, capsys):
    assert cli.main(["train", "configs/countdown_tiny.yaml", flag, value]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: command line: ") and says in error and error.count("\n") == 1
