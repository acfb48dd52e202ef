"""A policy that sees, through the real trainer: whose image a slot shows, what of images is kept, what the sampler reads."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from popo_jax import cli, exam, launch, problems, sft, train
from popo_jax.sampling import sampler as sampling
from popo_jax.scenes import blind
from popo_jax.types import UserError
from tests import tiny
from tests.killable import lucky
from tests.test_train import MIXED, TABLE, rows, spied

pytest.importorskip("PIL")
pytest.importorskip("transformers")


def config(**kw):
    return tiny.config(**tiny.SEES, **kw)


def go(path, c, grade):
    path.mkdir(parents=True, exist_ok=True)
    parts, seen = spied(tiny.parts(path, c, grade=grade, tokenizer=tiny.EYES))
    state, _ = train.loop(parts, tiny.state(parts.built), tiny.Progress())
    return state, seen, parts


@pytest.mark.parametrize("kw", [{}, {"batch__mini_batches": 2, "batch__micro_batch": 2, "batch__length_buckets": 4}], ids=str)
def test_a_replaced_slot_shows_its_own_groups_image(tmp_path, kw, monkeypatch):
    """Rows in any order: each is found by its tokens. Its log-probs at the start are those of its tokens with its image alone."""
    c = config(steps=2, **kw)
    _, seen, parts = go(tmp_path, c, tiny.by_pattern([MIXED, TABLE]))
    (_, _, _), (before, batch, out) = seen
    stored = {g.id: g for g in parts.buffer}
    replayed = pq.read_table(tmp_path / "replays" / "000002.parquet").to_pydict()
    assert replayed["slot"] == [1, 3]
    assert sum(~batch.fresh) == 8
    groups = [stored[i] for i in replayed["group_id"]]
    v, prompts = parts.built.model.c.vision, set()
    for g in groups:
        scene = parts.shown.gallery(g.task, g.prompt_id)
        prompts.add(scene.patches.tobytes())
        ends = np.cumsum(g.lengths)
        for row in np.split(g.tokens, ends[:-1]):
            at = [
                i
                for i in np.flatnonzero(~batch.fresh)
                if np.array_equal(batch.tokens[i, : len(row)], row) and not batch.tokens[i, len(row) :].any()
            ]
            found = [i for i in at if np.array_equal(batch.images.patches[i, : len(scene.patches)], scene.patches)]
            assert found, "a replayed row shows another image"
            for i in found:
                np.testing.assert_array_equal(batch.images.position[i, : len(scene.position)], scene.position)
                np.testing.assert_array_equal(batch.images.order[i, : len(scene.order)], scene.order)
    assert len(prompts) == 2 and batch.images.patches.shape[1:] == (4 * v.window_patches, 3 * v.patch**2)
    mask = batch.token_mask
    params = jax.tree.map(np.asarray, before.params)
    now = np.asarray(parts.built.score(params, batch.tokens, batch.images))
    np.testing.assert_allclose(out.logp_start[mask], now[mask], atol=2e-6)
    others = batch.images._replace(patches=255 - batch.images.patches)
    there = np.asarray(parts.built.score(params, batch.tokens, others))
    assert np.abs(there - now)[mask].max() > 1e-3, "the image does not matter: the test shows nothing"
    assert [r["replay/filled"] for r in rows(tmp_path)] == [0, 2] and all(r["mismatch/mean"] < 1e-5 for r in rows(tmp_path))


def test_each_image_is_read_once_for_a_group(tmp_path, monkeypatch):
    read, real = [], sampling._prefill

    def prefill(*args, **how):
        read.append(args[5].patches.shape[0])
        return real(*args, **how)

    monkeypatch.setattr(sampling, "_prefill", prefill)
    go(tmp_path, config(steps=1, mesh__data=1), tiny.by_pattern([MIXED]))
    assert read == [4], "images of four prompts, not of sixteen rows"


def test_a_buffer_holds_no_image_and_stays_as_large_as_it_is(tmp_path):
    """Two hundred steps; prepared images up to a limit that holds a few."""
    c = config(steps=200, replay__capacity=8, optim__learning_rate=1e-4)
    tmp_path.mkdir(exist_ok=True)
    parts = tiny.parts(tmp_path, c, grade=tiny.by_pattern([TABLE]), tokenizer=tiny.EYES)
    one = parts.shown.scenes(parts.collect.prompts(0, 1))[0].nbytes
    parts.shown.gallery._limit = 6 * one
    train.loop(parts, tiny.state(parts.built), tiny.Progress())
    found = rows(tmp_path)
    most = max(r["replay/mb"] for r in found) * 1e6
    longest = 4 * (c.row_tokens * 18 + 40)  # bytes: tokens, two masks, three log-probs
    assert 0 < most <= 8 * longest < one * 8 * 4, "images would be larger than that"
    assert max(r["replay/mb"] for r in found[100:]) <= max(r["replay/mb"] for r in found[10:100]) * 1.05
    assert all(r["images/cache_mb"] * 1e6 <= 6 * one for r in found) and found[-1]["replay/size"] == 8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeing")
    patch = pytest.MonkeyPatch()
    patch.setenv("POPO_CACHE", str(folder / "cache"))
    patch.setattr(launch, "Graders", lucky)
    data = tiny.plain.merge(tiny.BASE, tiny.plain.nest({k.replace("__", "."): v for k, v in tiny.SEES.items()}))
    limits = {"max_prompt_tokens": 24, "max_response_tokens": 24, "chunk": 8}
    (folder / "c.yaml").write_text(tiny.run_dir.yaml.safe_dump(data | {"steps": 3, "loss": {"kl_coef": 0.01}, "sample": limits}))
    assert cli.main(["train", str(folder / "c.yaml"), "--run-dir", str(folder / "run")]) == 0
    yield folder / "run"
    patch.undo()


def test_samples_name_files_in_which_the_images_can_be_looked_at(run):
    from PIL import Image

    table = pq.read_table(run / "samples" / "000001.parquet").to_pydict()
    assert len(table["images"]) == 16
    for prompt, files in zip(table["prompt_id"], table["images"], strict=True):
        assert files == [f"images/{prompt}-1.png"] and Image.open(run / files[0]).size == (56, 56)


def test_a_run_evaluates_blind_too_and_keeps_what_it_needs(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all("eval/blind/accuracy" in r for r in found if "eval/accuracy" in r) and len(found) == 4
    kept = tiny.run_dir.yaml.safe_load((run / "config.yaml").read_text())["images"]
    assert (kept["max_tokens"], kept["max_windows"]) == (4, 4)


def test_what_is_exported_answers_in_transformers_as_here(run, tmp_path):
    """Greedy, with the exported processor's own patches of the same pictures."""
    torch = pytest.importorskip("torch")
    import transformers

    assert cli.main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    there = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(out).eval()
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(out)
    from popo_jax import restore

    r = restore.restore(run, None)
    sources = problems.load(r.c, r.policy.tokenizer, r.policy.model)
    source = sources.held_out[0]
    some = source.problems[:4]
    prompts = [source.prompt(p) for p in some]
    sample = r.built.sampler(samples=1, temperature=0.0)
    ours = sample(r.state.params, [p.tokens for p in prompts], jax.random.key(0), version=0, scenes=sources.shown.scenes(prompts))
    image = r.policy.model.vision.image_token
    for i, (problem, prompt) in enumerate(zip(some, prompts, strict=True)):
        seen = processor(images=source.eyes.pictures(problem), return_tensors="pt")
        ids = torch.tensor(prompt.tokens)[None].long()
        kinds = (ids == image).int()
        n = r.c.sample.max_response_tokens
        got = there.generate(ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **seen, max_new_tokens=n)
        theirs = got[0, ids.shape[1] :].numpy()
        np.testing.assert_array_equal(ours.tokens[i][ours.sampled_mask[i]], theirs[: ours.sampled_mask[i].sum()])
    assert transformers.AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<|image_pad|>") == image


def test_a_file_of_pictures_is_an_examination_of_a_run_and_of_its_export(run, tmp_path, monkeypatch, capsys):
    """Larger pictures than those of the run's own problems, too."""
    from PIL import Image

    for i, side in enumerate((28, 56, 84)):
        Image.new("RGB", (side, side), ("red", "white", "blue")[i]).save(tmp_path / f"{i}.png")
    asked = [{"problem": "How long?", "answer": str(i), "images": [f"{i}.png"]} for i in (0, 1, 2, 0)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(p) + "\n" for p in asked))
    monkeypatch.setattr(exam, "Graders", lucky)
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    how = ["--task", "geometry", "--data", str(tmp_path / "data.jsonl"), "--k", "2", "--greedy", "True"]
    limits = ["--max-prompt-tokens", "160", "--max-response-tokens", "6"]
    given = []
    for model, name in ((run, "a"), (tmp_path / "out", "b")):
        assert cli.main(["eval", str(model), *how, *limits, "--out", str(tmp_path / name)]) == 0, capsys.readouterr().err
        lines = [(tmp_path / name / f).read_text().splitlines() for f in ("answers.jsonl", "greedy.jsonl")]
        given.append([[json.loads(x)["problem"] for x in part] for part in lines])
    assert [len(x) for x in given[0]] == [6, 3], "one problem occurs twice"
    assert len(set(given[0][1])) == 3 and given[0] == given[1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--images.max-pixels", "1568"], "was written with images.max_pixels 1003520, which must stay, got 1568"),
        (["--images.max-pixels", "2000000"], "was written with images.max_pixels 1003520, which must stay, got 2000000"),
        (["--images.min-pixels", "40000"], "was written with images.min_pixels 784, which must stay, got 40000"),
        (["--tasks.0.geometry.train-problems", "1"], "problems that are shown again: the data must have all of these, got "),
    ],
    ids=" ".join,
)
def test_a_resumed_run_is_shown_what_it_was_shown(run, capsys, change, says):
    """Larger pictures are refused for themselves, not for the room that they would take."""
    files = ("config.yaml", "metrics.jsonl")
    before = [(run / f).read_bytes() for f in files]
    assert cli.main(["train", "--resume", str(run), "--steps", "4", *change]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"error: checkpoint {run}/checkpoints/3 ") and says in said and "\n" not in said
    assert [(run / f).read_bytes() for f in files] == before


def test_stored_groups_want_their_pictures(run):
    from popo_jax import restore
    from popo_jax.replay.buffer import Buffer
    from popo_jax.runtime.checkpoints import Checkpoints

    c = restore.load_config(run / "config.yaml")
    with Checkpoints(run / "checkpoints", keep_last=2, keep_best=1) as checkpoints:
        groups = list(Buffer.from_arrays(c.replay, checkpoints.read_replay(3)))
    shown = problems.load(c, tiny.EYES, sft.fresh_policy(c).model).shown
    assert groups and launch._check_shown(groups, shown, "HERE") is None
    for known in (None, shown):
        other = [dataclasses.replace(g, prompt_id=f"{g.prompt_id}x") for g in groups]
        with pytest.raises(UserError, match=r"^HERE stores groups of .*, got \d+, not geometry-\w+x of task geometry$"):
            launch._check_shown(other + groups, known, "HERE")
    text = [dataclasses.replace(g, task="countdown") for g in groups]
    assert launch._check_shown(text, None, "HERE") is None


def test_grey_pictures_are_other_pictures(run):
    from popo_jax import restore

    r = restore.restore(run, None)
    sources = problems.load(r.c, r.policy.tokenizer, r.policy.model)
    prompts = [sources.held_out[0].prompt(p) for p in sources.held_out[0].problems[:4]]
    scenes = sources.shown.scenes(prompts)
    greys = [blind(s) for s in scenes]
    assert all((g.patches == g.patches[0, 0]).all() and g.order is s.order for g, s in zip(greys, scenes, strict=True))


def test_pictures_want_a_policy_that_sees_and_room_for_them():
    c = tiny.config(tasks=tiny.SEES["tasks"])
    with pytest.raises(UserError, match="task geometry has pictures: the policy must be of family qwen2_5_vl"):
        problems.load(c, tiny.TOKENIZER, c.model)
    c = config(images__max_tokens=3)
    with pytest.raises(UserError, match=r"images\.max_tokens must be at least the 4 of a problem, got 3"):
        problems.load(c, tiny.EYES, sft.fresh_policy(c).model)


def test_a_broken_picture_is_told_with_the_row_that_names_it(tmp_path):
    """Found when its row is reached, when the problems were divided long since; the row is no part of a problem's id."""
    from PIL import Image

    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (56, 56, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    asked = [json.dumps({"problem": "x", "answer": str(i), "images": [f"{5 - i}.png", f"{i}.png"]}) for i in (0, 1, 2, 4, 5)]
    file = tmp_path / "data.jsonl"
    file.write_text("\n\n".join(asked) + "\n")
    task = {"name": "geometry", "train_file": str(file), "geometry": {"eval_problems": 2, "instruction": ""}}
    c = tiny.config(**tiny.SEES | {"tasks": [task]}, sample__max_prompt_tokens=32)
    found = problems.load(c, tiny.EYES, sft.fresh_policy(c).model)
    told = []
    for source in (*found.train, *found.held_out):
        for problem in source.problems:
            assert source.id(problem) == source.id({k: problem[k] for k in ("problem", "answer", "images")})
            try:
                found.shown.gallery(source.task, source.id(problem))
            except UserError as e:
                told.append(str(e))
    assert [t.split(" must be a whole picture, got one")[0] for t in told] == [f"{file}, line 5, image 1"]
    (tmp_path / "3.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=f"^{file}, line 5, image 1 must be a picture that Pillow opens"):
        problems.load(c, tiny.EYES, sft.fresh_policy(c).model)


def test_text_tasks_and_pictures_go_together(tmp_path):
    tasks = [*tiny.SEES["tasks"], {"name": "countdown", "countdown": {"train_problems": 64, "eval_problems": 16}}]
    c = tiny.config(**tiny.SEES | {"tasks": tasks}, steps=2)
    _, seen, _ = go(tmp_path, c, tiny.by_pattern([MIXED]))
    shown = [batch.images.order[:, 0] >= 0 for _, batch, _ in seen]
    assert any(s.any() and not s.all() for s in shown), "no batch had both"
    assert all(r["mismatch/mean"] < 1e-5 for r in rows(tmp_path))
    assert dataclasses.asdict(c)["steps"] == 2


def test_an_adapter_that_peft_would_not_find_is_not_written(run, tmp_path, monkeypatch):
    from popo_jax import export, restore

    r = restore.restore(run, None)
    model = dataclasses.replace(r.policy.model, lora=dataclasses.replace(r.policy.model.lora, rank=4))
    lora = dataclasses.replace(r, policy=dataclasses.replace(r.policy, model=model))
    monkeypatch.setattr(export.restore, "restore", lambda *_: lora)
    with pytest.raises(UserError, match="--adapter is of policies that read text alone"):
        export.export(run, tmp_path / "out", None, adapter=True)
    assert not (tmp_path / "out").exists()
