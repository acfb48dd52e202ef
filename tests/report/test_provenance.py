"""Where a run comes from and what it cost, recomputed from its files by other code; the model card."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from popo_jax.report import provenance
from popo_jax.report.card import card
from popo_jax.report.frame import Finding, Section, Table
from popo_jax.report.read import read
from tests.report import runs


def rows(path):
    return [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]


def table(section, name):
    return dict(next(t for t in section.tables if t.id == f"provenance/{name}").rows)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.write(tmp_path_factory.mktemp("made") / "run")


def with_sessions(run, tmp_path, *changes, joules=None):
    """A copy with one session for each change, and counted energy."""
    import shutil

    path = tmp_path / "copy"
    shutil.copytree(run, path)
    first = json.loads((path / "sessions.jsonl").read_text())
    (path / "sessions.jsonl").write_text("".join(json.dumps(first | c) + "\n" for c in changes))
    if joules is not None:
        new = [r | ({"energy/joules": joules} if r["step"] > 20 else {}) for r in rows(path)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in new))
    return path


def test_cost_is_what_the_metrics_add_up_to(run):
    cost = table(provenance.section(read(run)), "cost")
    took = sum(r.get("time/step", r.get("time/eval", 0)) for r in rows(run))
    assert cost["hours, sum of the steps"] == pytest.approx(took / 3600)
    assert cost["device hours"] == pytest.approx(2 * took / 3600), "two devices"
    assert cost["steps"] == 40 and cost["responses sampled in training"] == 40 * 8 * 4
    assert cost["tokens sampled in training"] == rows(run)[-1]["tokens_generated_total"]
    assert cost["answers to held-out problems"] == 5 * 60
    for part in ("sample", "grade", "replay", "update", "eval"):
        assert cost[f"{part}: hours"] == pytest.approx(sum(r.get(f"time/{part}", 0) for r in rows(run)) / 3600)
    assert math.isnan(cost["energy, kWh"])


def test_devices_are_those_of_the_session_that_made_a_step(run, tmp_path):
    devices = [
        {"step": s, "devices": {"platform": "gpu", "kind": "NVIDIA H100 80GB HBM3", "count": n}} for s, n in ((0, 2), (30, 8))
    ]
    r = read(with_sessions(run, tmp_path, *devices))
    took = [(x["step"], x.get("time/step", x.get("time/eval", 0))) for x in rows(run)]
    hours = sum(t * (8 if s > 30 else 2) for s, t in took) / 3600
    assert provenance.device_hours(r) == pytest.approx(hours)
    kwh, told = provenance.energy(r)
    assert kwh == pytest.approx(hours * 0.7) and "estimated as device hours x 700 W" in told and "upper bound" in told


def test_counted_energy_wins_and_says_of_how_much(run, tmp_path):
    kwh, told = provenance.energy(read(with_sessions(run, tmp_path, {}, joules=3600.0)))
    assert kwh == pytest.approx(20 * 3600 / 3.6e6) and "counted" in told and "of 50% of the steps" in told


def test_an_unknown_device_has_no_energy_and_a_sentence(run):
    kwh, told = provenance.energy(read(run))
    assert math.isnan(kwh) and "no rated power is kept for cpu" in told


def test_every_setting_code_data_and_machine_are_there(run):
    section = provenance.section(read(run))
    settings = table(section, "settings")
    assert settings["sample.temperature"] == 1.0 and settings["tasks.0.name"] == "math" and "fingerprints.data" not in settings
    assert table(section, "code")["jax"] == "0.10.2" and table(section, "data")["fingerprint of reward"] == "f" * 16
    assert table(section, "machine")["devices"] == "2 x cpu (cpu)"
    (figure,) = section.figures
    step = next(s for s in figure.series if s.name == "step")
    assert list(step.y) == [r["time/step"] for r in rows(run)[1:]] and list(step.x) == list(range(1, 41))


def test_a_run_of_nothing_has_no_figures(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    section = provenance.section(read(tmp_path))
    assert not section.figures and any("sessions.jsonl is not there" in n for n in section.notes)
    assert "an unknown device" in " ".join(section.notes)


def test_a_card_has_a_head_that_the_hub_reads_and_no_markup_of_the_run(run):
    gains = Table("data/gains", "Who gained", ("slice", "change"), (("<b>level|1", 0.25), ("level 2", None)), "caution")
    found = [Finding("slice-fell", "level *3* fell <script>alert(1)</script>", "look", "data")]
    text = card(read(run), [Section("data", "Data", tables=(gains,))], found)
    _, head, body = text.split("---\n", 2)
    parsed = yaml.safe_load(head)
    assert parsed["library_name"] == "transformers" and "rlvr" in parsed["tags"]
    (metric,) = parsed["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == pytest.approx(json.loads((run / "summary.json").read_text())["eval/accuracy/last_two"], abs=1e-4)
    assert "<script>" not in body and "&lt;b&gt;level\\|1 | 0.25" in body and "| level 2 | - |" in body
    assert "**slice-fell**" in body and "level \\*3\\* fell" in body and "Intended use and limits" in body


def test_a_card_names_its_base_model_and_data_set(run, tmp_path):
    import shutil

    path = tmp_path / "copy"
    shutil.copytree(run, path)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["policy"]["path"] = "Qwen/Qwen2.5-1.5B"
    config["tasks"][0]["math"] = {"dataset": "agentica-org/DeepScaleR-Preview-Dataset"}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    head = yaml.safe_load(card(read(path), [], []).split("---\n", 2)[1])
    assert head["base_model"] == "Qwen/Qwen2.5-1.5B" and head["datasets"] == ["agentica-org/DeepScaleR-Preview-Dataset"]
    config["policy"]["path"] = "/home/me/policy"
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    assert "base_model" not in yaml.safe_load(card(read(path), [], []).split("---\n", 2)[1])
