"""The benchmark suite: formulas, forced lengths, lines, the command; every case at a size of its own. No time is asserted."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.suite import loop, measure, registry, replay, report, sampler, startup
from benchmarks.suite.forced import Forced, equal, uniform
from benchmarks.suite.load import Load
from benchmarks.suite.measure import Timed, rounds
from benchmarks.suite.sizes import ROOT, SIZES, Head, Size, built, defaults, prompts
from popo_jax import cli
from popo_jax.costs import arithmetic
from popo_jax.model_config import ModelConfig
from popo_jax.models.decoder import Decoder
from popo_jax.replay.fill import fill
from popo_jax.rl.state import TrainState, abstract_batch
from popo_jax.sampling import sampler as sampling
from popo_jax.sampling.sampler import Sampler
from tests import tiny

WIDE = ModelConfig(
    vocab_size=512, layers=3, width=256, heads=4, kv_heads=2, head_dim=64, mlp=768, linear="plain", attention="xla"
)
"""Wide enough for the products to be nearly all of the work; few enough blocks for training's scan to be unrolled."""
TOLERANCE = 0.02
"""What norms, softmax and activations add to the products, at most."""
C = tiny.config(sample__max_response_tokens=12)
PADDED = tiny.config(sample__max_response_tokens=40, batch__micro_batch=2, batch__length_buckets=4)
HEAD = Head(512, 16, kept=(4, 256), timed=(2, 16))
MICRO = Size("micro", "for tests", C, C, side=32, copied=1 << 12, seconds=0.0, padded=PADDED, head=HEAD)


def counted(f, *args) -> float:
    """FLOPs that XLA counts in the program before kernels replace its products."""
    return jax.jit(f).lower(*args).cost_analysis()["flops"]


@pytest.fixture(scope="module")
def wide():
    model = Decoder(WIDE)
    return model, jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize(("tie", "kv_heads"), [(True, 2), (False, 4)])
def test_forward_and_training_flops_are_those_xla_counts(tie, kv_heads):
    c = dataclasses.replace(WIDE, tie_embeddings=tie, kv_heads=kv_heads)
    model = Decoder(c)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)

    def f(params, tokens):
        return model.logits(params, tokens).sum()

    formula = arithmetic.forward(c, rows=4, tokens=64, rectangle=True)
    assert 1 - TOLERANCE < formula / counted(f, params, tokens) < 1
    assert 1 - TOLERANCE < 3 * formula / counted(jax.value_and_grad(f), params, tokens) < 1


def test_decode_and_prefill_flops_are_those_xla_counts(wide):
    model, params = wide
    weights = jax.eval_shape(model.for_decode, params)
    tokens, start = jax.ShapeDtypeStruct((4, 64), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    prefill = counted(lambda *a: model.prefill(*a, 96), weights, tokens, start)
    assert 1 - TOLERANCE < arithmetic.forward(WIDE, rows=4, tokens=64, logits=1, rectangle=True) / prefill < 1
    cache = jax.eval_shape(lambda *a: model.prefill(*a, 96), weights, tokens, start)[1]
    slot = jax.ShapeDtypeStruct((), jnp.int32)
    decode = counted(model.decode, weights, cache, start, slot, start)
    assert 1 - TOLERANCE < arithmetic.decode(WIDE, tokens=4, seen=4 * 96) / decode < 1


def test_causal_attention_counts_what_a_query_may_see():
    shape = {"rows": 2, "tokens": 5}
    causal, whole = (arithmetic.forward(WIDE, **shape, rectangle=r) for r in (False, True))
    unseen = sum(s > t for t in range(5) for s in range(5))
    assert whole - causal == 2 * unseen * 4 * WIDE.layers * WIDE.heads * WIDE.head_dim
    assert arithmetic.train(WIDE, **shape) == 3 * causal and arithmetic.train(WIDE, **shape, mini_batches=2) == 4 * causal


def test_a_whole_call_decodes_all_but_the_first_token_of_each_response():
    lengths = np.array([1, 4, 9])
    steps = [(i, 7 + j) for i, n in enumerate(lengths) for j in range(1, n)]  # token j sees the prompt, j tokens with itself
    assert arithmetic.decoded(7, lengths) == {"tokens": len(steps), "seen": sum(s for _, s in steps)}
    whole = arithmetic.forward(WIDE, rows=1, tokens=7, logits=1) + arithmetic.decode(WIDE, **arithmetic.decoded(7, lengths))
    assert arithmetic.sampled(WIDE, prompts=1, prompt=7, lengths=lengths) == whole


def test_decoding_reads_the_weights_once_a_step_and_the_slots_it_sees(wide):
    weights = jax.eval_shape(wide[0].for_decode, wide[1])
    matrices = sum(x.size for x in jax.tree.leaves(weights) if x.ndim > 1)
    slot = 2 * WIDE.layers * WIDE.kv_heads * WIDE.head_dim
    assert arithmetic.decode_bytes(WIDE, steps=3, seen=10) == 4 * (3 * matrices + 10 * slot)
    half = dataclasses.replace(WIDE, dtype="bfloat16")
    assert 2 * arithmetic.decode_bytes(half, steps=3, seen=10) == arithmetic.decode_bytes(WIDE, steps=3, seen=10)


@pytest.fixture(scope="module")
def policy():
    c = tiny.config(sample__max_response_tokens=12, sample__chunk=4, batch__prompts=32, batch__group_size=8)
    b = built(c, 1)
    return b, b.fresh_params(jax.random.key(0)), prompts(c, b.model.c.vocab_size)


def lengths(policy, hazard, key=3, **kw):
    b, params, asked = policy
    c = dataclasses.replace(b.rollout_sampler().c, **kw)
    model = Forced(b.model.c, c.eos_ids[0], c.max_prompt, hazard)
    return Sampler(model, c, b.mesh)(params, asked, jax.random.key(key), version=0)


def test_forced_lengths_are_uniform_on_what_was_asked(policy):
    r = lengths(policy, uniform(2, 12))
    n = r.sampled_mask.sum(axis=1)
    times = np.bincount(n, minlength=13)
    assert r.ended.all() and times[:2].sum() == 0 and (times[2:] > 0).all()
    expected = len(n) / 11
    assert ((times[2:] - expected) ** 2 / expected).sum() < 25.2  # chi-square, 10 degrees of freedom, p = 0.005
    assert (n.reshape(32, 8).std(axis=1) > 0).all()  # within a group too


def test_forced_lengths_do_not_hang_on_compaction_and_waves(policy):
    a, b = lengths(policy, uniform(2, 12)), lengths(policy, uniform(2, 12), max_rows=128, chunk=7)
    np.testing.assert_array_equal(a.sampled_mask, b.sampled_mask)


def test_the_end_token_has_the_probability_that_was_asked(policy):
    r = lengths(policy, uniform(2, 12))
    n = r.sampled_mask.sum(axis=1)
    last = r.logp[np.arange(len(n)), n - 1]
    np.testing.assert_allclose(np.exp(last), 1 / (13 - n), rtol=1e-4)


def test_forced_lengths_can_be_equal(policy):
    r = lengths(policy, equal(7, 12))
    assert (r.sampled_mask.sum(axis=1) == 7).all() and r.ended.all()


def test_forced_logits_are_the_models_but_for_the_end_token(policy):
    b, params, asked = policy
    forced, S = Forced(b.model.c, 1, 24, uniform(2, 12)), 24
    weights, tokens, start = b.model.for_decode(params), np.stack(asked[:3]), np.zeros(3, np.int32)

    def both(model):
        logits, cache = model.prefill(weights, tokens, start, S + 4)
        return logits, model.decode(weights, cache, np.array([5, 6, 7]), jnp.int32(S), start)[0]

    for x, y in zip(*(jax.jit(both, static_argnums=0)(model) for model in (b.model, forced)), strict=True):
        np.testing.assert_array_equal(np.delete(x, 1, axis=1), np.delete(y, 1, axis=1))
        assert (np.asarray(x)[:, 1] != np.asarray(y)[:, 1]).all()


@pytest.mark.parametrize(("name", "millions"), [("0.5b", 494.0), ("1.5b", 1543.7), ("7b", 7615.6)])
def test_large_sizes_lower_without_being_allocated(name, millions):
    """The programs of train_step and sampler, traced and lowered; parameters as Qwen2.5's model cards count them."""
    b = built(SIZES[name].train, 1)
    assert sum(x.size for x in jax.tree.leaves(b.abstract_state.params)) / 1e6 == pytest.approx(millions, abs=0.1)
    rows, T = b.c.rows, b.c.row_tokens
    state, out = b.train_step.lower(b.abstract_state, abstract_batch(b.split, b.model.c)).out_info
    assert isinstance(state, TrainState) and out.logp_start.shape == (rows, T)
    b = built(SIZES[name].sample, 1)
    c, model = sampler.endless(b), b.model
    weights = jax.eval_shape(model.for_decode, b.abstract_state.params)
    P, B = b.c.batch.prompts, b.c.rows
    key, scalar = jax.eval_shape(jax.random.key, 0), jax.ShapeDtypeStruct((), jnp.int32)
    tokens, start, row = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((P, c.max_prompt), (P,), (B,)))
    rows = sampling._prefill.lower(weights, tokens, start, row, key, model=model, c=c, mesh=b.mesh).out_info[0]
    assert rows.cache[0][1].shape == (B, model.c.kv_heads, c.max_prompt + c.max_response, model.c.head_dim)
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rows)
    drawn = sampling._decode.lower(weights, rows, scalar, scalar, key, model=model, c=c, mesh=b.mesh).out_info[1]
    assert drawn.tokens.shape == (B, c.chunk)


def test_the_quick_starts_size_is_the_quick_starts():
    c = cli.parse_config(str(ROOT / "configs" / "countdown_tiny.yaml"), [], print)
    assert SIZES["tiny"].train == c
    small = SIZES["small"]
    assert (small.train.rows, small.train.row_tokens, small.sample.rows) == (128, 96, 64)


def test_defaults_follow_the_device():
    assert defaults("cpu") == ["tiny", "small"] and defaults("gpu") == defaults("tpu") == ["1.5b"]


def test_rounds_leave_out_the_first_and_what_prepares(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    calls: list[str] = []

    def take(name, seconds):
        calls.append(name)
        clock[0] += seconds

    took = iter([100.0, 1.0, 2.0, 3.0])
    parts = {
        "a": Timed(lambda x: take(f"a{x}", next(took)), lambda: (take("prepare", 50.0), (7,))[1]),
        "b": Timed(lambda: take("b", 0.5)),
    }
    got = rounds(parts, seconds=0.0, least=3)
    assert got.seconds == {"a": [1.0, 2.0, 3.0], "b": [0.5] * 3} and got.first == {"a": 100.0, "b": 0.5}
    assert calls == ["prepare", "a7", "b"] * 4
    assert len(rounds({"b": parts["b"]}, seconds=2.25, least=1).seconds["b"]) == 5
    assert len(rounds({"b": parts["b"]}, seconds=1e9, least=1, most=4).seconds["b"]) == 4


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the kernel does not tell")
def test_a_busy_neighbour_shows(monkeypatch):
    from benchmarks.suite import load

    seconds = iter([10.0, 14.0])
    monkeypatch.setattr(load, "busy", iter([100.0, 107.0]).__next__)
    monkeypatch.setattr(load, "own", iter([5.0, 6.0]).__next__)
    monkeypatch.setattr(load.time, "monotonic", lambda: next(seconds))
    assert Load().others() == 1.5


def test_compiling_gives_a_program_and_its_memory():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    program = measure.compiled(jax.jit(lambda x: jnp.tanh(x @ x) @ x), x)
    assert program.temp_bytes >= 256 * 256 * 4 and program.compile_s > 0
    np.testing.assert_allclose(program.call(jnp.eye(256)), np.tanh(np.eye(256)), rtol=1e-6)


KEYS = (
    *("case", "size", "device", "versions", "commit", "date", "median_s", "min_s", "max_s", "n"),
    *("compile_s", "temp_bytes", "flops", "tokens_per_s", "share_of_peak", "extra"),
)


def test_a_line_has_every_key_and_its_figures():
    peak = measure.Peak(100.0, 8.0)
    x = json.loads(report.dumps(report.line("a", "b", [4.0, 1.0, 2.0], flops=50, tokens=6, peak=peak, others=0.5, rows=3)))
    assert tuple(x) == KEYS
    assert (x["median_s"], x["min_s"], x["max_s"], x["n"], x["tokens_per_s"]) == (2.0, 1.0, 4.0, 3, 3.0)
    assert x["share_of_peak"] == 0.25 and x["compile_s"] is None and x["temp_bytes"] is None
    assert x["extra"] == {"rows": 3, "others": 0.5, "peak_flops_per_s": 100.0, "copy_bytes_per_s": 8.0}
    x = json.loads(report.dumps(report.line("a", "b", [4.0])))
    assert tuple(x) == KEYS and x["tokens_per_s"] is x["share_of_peak"] is x["flops"] is None


CASES = {
    "train_step": ["train_step", "train_step/forward"],
    "padding": ["padding/whole", "padding/cut", "padding/half"],
    "head": ["head/plain", "head/chunked"],
    "sampler": [f"sampler/{x}" for x in ("prefill", "decode", "whole", "equal", "uniform")],
    "replay": ["replay/fill", "replay/assemble", "replay/store"],
    "verifiers": [f"verifiers/{task}{kind}" for task in ("countdown", "arithmetic", "math") for kind in ("", "_hostile")]
    + ["verifiers/math_worked", "verifiers/geometry", "verifiers/geometry_hostile"],
    "checkpoint": ["checkpoint/save", "checkpoint/restore"],
    "loop": ["loop/grpo", "loop/popo"],
}


@pytest.mark.parametrize("case", CASES)
def test_every_case_runs(case):
    lines = {x.case: x for x in registry.CASES[case](MICRO)}
    assert set(lines) >= set(CASES[case])
    for x in lines.values():
        assert x.n >= measure.LEAST and 0 < x.min_s <= x.median_s <= x.max_s and x.size == "micro"
        json.loads(report.dumps(x))
    if case in ("train_step", "sampler", "head"):
        assert all(x.share_of_peak > 0 and x.flops > 0 and x.tokens_per_s > 0 for x in lines.values())
    if case == "sampler":
        assert lines["sampler/whole"].extra["lengths"] == [12, 12.0, 12]
        assert lines["sampler/equal"].extra["lengths"] == [7, 7.0, 7]
        low, _, high = lines["sampler/uniform"].extra["lengths"]
        assert 1 <= low < high <= 12 and lines["sampler/uniform"].extra["of_equal"] > 0
    if case == "padding":
        whole, cut, half = (lines[f"padding/{x}"].extra for x in ("whole", "cut", "half"))
        assert whole["computed_share"] == whole["of_whole"] == 1 and whole["lengths"] == [64]
        assert cut["needed_share"] == whole["needed_share"] <= cut["computed_share"] < 1 and len(cut["lengths"]) > 2
        assert half["computed_share"] < cut["computed_share"] and half["needed_share"] < cut["needed_share"]
    if case == "head":
        plain, chunked = (lines[f"head/{x}"].extra for x in ("plain", "chunked"))
        assert plain["of_plain"] == plain["kept_of_plain"] == 1 and chunked["of_plain"] > 0
        assert plain["kept_bytes"] > 2 * 4 * 256 * 512 * 4 > 2 * chunked["kept_bytes"] and chunked["chunk"] == 4
    if case == "loop":
        grpo, popo = lines["loop/grpo"].extra, lines["loop/popo"].extra
        assert grpo["cpu_of_grpo"] == 1 and grpo["replayed"] == 0 and popo["replayed"] == 2
        assert 0 < popo["replay_of_cpu"] < 1


def test_grpo_and_popo_of_the_loop_share_one_compiled_step(tmp_path):
    b = built(C, 1)
    for name in ("grpo", "popo"):
        going = loop.begin(b, name, tmp_path / name)
        going.go_on(2)
        going.go_on(1)
        rows = going.parts.journal.run.metrics.rows()
        assert [r["step"] for r in rows] == [1, 2, 3] and all(r["groups/effective"] == 0.5 for r in rows)
        assert len(going.rows()) == 1
    assert b.train_step._cache_size() == 1


def test_the_measured_fill_replaces_half_of_the_slots_from_a_full_buffer():
    buffer, fresh = replay.full_buffer(C), replay.step_groups(C, replay.VERSION)
    assert len(buffer) == buffer.capacity == 16
    plan = fill(buffer, fresh, version=replay.VERSION, preset=C.algorithm.preset, seed=0, step=0)
    assert plan.replaced.tolist() == [False, True, False, True] and plan.counted.all()


def test_a_start_is_timed_to_rows_0_and_1(tmp_path):
    config = startup.write(MICRO, tmp_path)
    to_row_0, to_row_1 = startup.start(config, tmp_path / "run", tmp_path / "cache")
    assert 0 < to_row_0 < to_row_1
    assert any((tmp_path / "cache" / "xla").iterdir())


def test_a_start_that_fails_says_why(tmp_path):
    (tmp_path / "c.yaml").write_text("stepz: 3")
    with pytest.raises(RuntimeError, match="unknown key stepz"):
        startup.start(tmp_path / "c.yaml", tmp_path / "run", tmp_path / "cache")


def test_a_start_keeps_no_compiled_programs_of_others(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    env = startup.environment(tmp_path)
    assert "JAX_COMPILATION_CACHE_DIR" not in env and env["POPO_CACHE"] == str(tmp_path) and env["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["trian_step"], "popo bench: case must be one of train_step, padding, head, sampler,"),
        (["trian_step"], "got trian_step (did you mean train_step?)"),
        (["replay", "--size", "smal"], "--size must be one of tiny, small, 0.5b, 1.5b, 7b, got smal (did you mean small?)"),
        (["replay", "--out", __file__], f"--out {__file__} must not exist yet"),
    ],
)
def test_bad_arguments_are_told_in_one_sentence(capsys, args, says):
    assert cli.main(["bench", *args]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and says in err and len(err.splitlines()) == 1


def test_without_a_checkout_it_says_where_to_run(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "benchmarks.suite", None)
    assert cli.main(["bench"]) == 2
    assert capsys.readouterr().err.strip().endswith("in a checkout, run: python -m popo_jax.cli bench")


def test_a_broken_suite_is_not_taken_for_a_missing_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "benchmarks.suite.registry", None)
    monkeypatch.delattr("benchmarks.suite.registry")
    with pytest.raises(ImportError):
        cli.main(["bench"])


def test_list_names_every_case_and_size(capsys):
    assert cli.main(["bench", "--list"]) == 0
    first = [x.split()[0] for x in capsys.readouterr().out.splitlines() if x.startswith("  ")]
    assert first == [*registry.CASES, *SIZES]


@pytest.mark.slow
def test_the_command_prints_lines_keeps_them_and_ends_with_a_table(tmp_path):
    out, command = (
        tmp_path / "lines.jsonl",
        [sys.executable, "-m", "popo_jax.cli", "bench", "replay", "verifiers", "--size", "tiny"],
    )
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    lines = [json.loads(x) for x in done.stdout.splitlines()]
    assert [x["case"] for x in lines] == CASES["replay"] + CASES["verifiers"] and out.read_text() == done.stdout
    assert "replay/store" in done.stderr and "median" in done.stderr


def test_results_are_made_from_the_kept_lines():
    text = report.RESULTS.read_text()
    assert report.replaced(text) == text, "run python -m benchmarks.suite.report"
    kept = [json.loads(x) for p in report.KEPT.glob("*.jsonl") for x in p.read_text().splitlines()]
    assert kept and all(tuple(x) == KEYS for x in kept)


def test_a_changed_line_changes_the_results(monkeypatch, tmp_path):
    line = asdict(report.line("a/b", "tiny", [1.0], rows=1)) | {"device": "a machine"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.setattr(report, "KEPT", tmp_path)
    made = report.replaced(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert made.startswith("before\n") and made.endswith("\nafter\n") and "old" not in made
    assert "### a machine" in made and "| a/b | tiny | 1.00 s |" in made
    with pytest.raises(ValueError, match="must hold the lines"):
        report.replaced("nothing")


def test_the_package_reaches_for_the_suite_in_the_command_only():
    for path in sorted((ROOT / "popo_jax").rglob("*.py")):
        tree = ast.parse(path.read_text())
        inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name == "_bench" for n in ast.walk(f)}
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(n.split(".")[0] == "benchmarks" for n in names):
                assert path.name == "cli.py" and node in inside, path


def test_peaks_come_from_the_best_round(monkeypatch):
    seconds = {"product": [2.0, 1.0], "copy": [4.0, 0.5], "x": [1.0, 1.0]}
    monkeypatch.setattr(measure, "rounds", lambda parts, seconds: measure.Measured(result, {}, others=0.0))
    result = seconds
    got = measure.beside_peak({"x": Timed(lambda: None)}, MICRO)
    assert got.peak == measure.Peak(2 * 32**3 / 1.0, 2 * 4096 / 0.5) and got.others == 0.0


def test_prompts_have_no_end_token(policy):
    asked = prompts(C, 99)
    assert len(asked) == 4 and all(len(p) == 24 and 1 not in p for p in asked)
