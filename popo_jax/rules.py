"""What settings must hold: ranges, relations, what a preset fills in, and which keys the chosen algorithm does not read."""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from collections.abc import Callable, Iterator, Mapping

from popo_jax import plain
from popo_jax.config import Config
from popo_jax.model_config import MODEL_HOW, ModelConfig
from popo_jax.task_config import PICTURED, TASK_NAMES, UNBOUNDED, GeometryConfig, MathConfig, TaskConfig
from popo_jax.types import UserError


def resolve(c: Config) -> Config:
    """Check every setting and fill in those that depend on others. Errors: UserError, one sentence."""
    P, preset, r = c.batch.prompts, c.algorithm.preset, c.replay
    replay = dataclasses.replace(
        r,
        capacity=r.capacity if r.capacity is not None else preset.room * P,
        candidates=r.candidates if r.candidates is not None else 4 * P,
        extra=r.extra if r.extra is not None else preset.extra * P,
    )
    if preset.order != "priority":  # eviction follows the same order
        replay = dataclasses.replace(replay, quality="uniform", selection="top")
    c = dataclasses.replace(c, replay=replay)
    for sentence in _broken_rules(c):
        raise UserError(sentence)
    return c


def unread(c: Config) -> dict[str, str]:
    """Dotted keys (a section's name stands for all of it) that this run does not read, each with the reason."""
    p, name = c.algorithm.preset, c.algorithm.name
    keys: dict[str, str] = {}
    if p.slots != "replay":
        keys["replay"] = f"algorithm {name} has no replay"
    if c.selection.method == "uniform":
        others = ("candidates", "decay", "prior", "prior_mean", "target")
        keys |= {f"selection.{k}": "selection.method uniform takes the next prompts" for k in others}
    if p.slots != "resample":
        keys["algorithm.max_rounds"] = f"algorithm {name} samples once per step"
    weighted = (p.slots == "replay" and not p.marked_fresh and p.around == "proximal") or c.weight.correct_sampler
    if not weighted:
        keys |= {f"weight.{k}": f"algorithm {name} has weight 1 everywhere" for k in ("cap", "level")}
    if p.around == "behaviour":
        keys["weight"] = f"algorithm {name} has weight 1 everywhere"
    if p.order != "kl":
        keys["replay.candidates"] = f"algorithm {name} does not score groups"
    else:
        keys |= {f"replay.{k}": "popo-kl orders by measured divergence" for k in ("quality", "selection", "half_life")}
    if p.order == "newest":
        keys |= {f"replay.{k}": f"algorithm {name} takes the newest group" for k in ("quality", "selection", "half_life")}
    if c.replay.quality == "uniform" and c.replay.selection == "top":
        keys.setdefault("replay.half_life", "pure recency orders by version alone")
    if c.policy.path is not None:
        keys["warm_start"] = "policy.path names a policy"
        shape = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in MODEL_HOW]
        keys |= {f"model.{k}": "the shape comes from policy.path" for k in shape}
    elif not c.model.sees:
        keys |= {"model.vision": f"model.family {c.model.family} reads text alone"}
    if not any(t.name in PICTURED for t in c.tasks):
        keys["images"] = "no task has pictures"
    if c.batch.micro_batch != "auto":
        keys["batch.memory_gb"] = "batch.micro_batch is not auto"
    if c.model.lora.rank is None:
        keys |= {f"model.lora.{k}": "model.lora.rank is null" for k in ("alpha", "targets")}
    if c.chat.template is False:
        keys |= {f"chat.{k}": "chat.template is false" for k in ("system", "thinking", "date")}
    for i, task in enumerate(c.tasks):
        for name in TASK_NAMES:
            if task.name != name:
                keys[f"tasks.{i}.{name}"] = f"task {i} is {task.name}"
            elif name in ("math", "geometry"):
                keys |= {f"tasks.{i}.{name}.{k}": why for k, why in _unread_given(task).items()}
            elif task.train_file and task.eval_file:
                generated = [f.name for f in dataclasses.fields(getattr(task, name)) if f.name != "prompt"]
                keys |= {f"tasks.{i}.{name}.{k}": "both files are given" for k in generated}
    if not any(t.verifier or t.name in UNBOUNDED for t in c.tasks):
        keys["verifier"] = "no task is graded in worker processes"
    return keys


def _unread_given(task: TaskConfig) -> dict[str, str]:
    """Of a task whose problems are given or generated."""
    c: MathConfig | GeometryConfig = getattr(task, task.name)
    keys: dict[str, str] = {}
    if task.train_file is not None or c.dataset is not None:
        keys |= dict.fromkeys(_GENERATED[task.name], "problems are given, not generated")
        if task.eval_file is not None or (c.dataset is not None and c.eval_split is not None):
            keys |= dict.fromkeys(("eval_problems", "seed"), "held-out problems are given")
    elif task.name == "math":
        keys |= dict.fromkeys(("problem_column", "answer_column"), "problems are generated")
    if c.dataset is None:
        keys |= dict.fromkeys(("dataset_name", "train_split", "eval_split"), "no dataset is given")
    elif task.train_file is not None:
        keys["train_split"] = "train_file is given"
    return keys


_GENERATED = {
    "math": ("train_problems", "steps", "high"),
    "geometry": ("train_problems", "kinds", "low", "high", "step", "size", "jitter"),
}
"""What only generated problems read."""


def why_unread(key: str, unread_keys: Mapping[str, str]) -> str | None:
    """The reason why dotted `key`, or the section it lies in, is not read; None if it is."""
    return next((why for k, why in unread_keys.items() if key == k or key.startswith(k + ".")), None)


_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "be at least 1",
        lambda v: v >= 1,
        "steps batch.prompts batch.mini_batches batch.micro_batch sample.max_prompt_tokens sample.max_response_tokens "
        "sample.chunk sample.top_k eval.every eval.problems eval.samples checkpoint.every checkpoint.keep_last "
        "algorithm.max_rounds algorithm.dead_steps replay.min_age replay.max_uses replay.candidates mesh.data mesh.fsdp "
        "mesh.tensor model.vocab_size model.layers model.width model.heads model.kv_heads model.mlp model.max_positions "
        "model.window model.rope_scaling.original_positions model.lora.rank model.head_chunk warm_start.steps "
        "warm_start.batch selection.candidates verifier.workers model.vision.layers model.vision.width model.vision.heads "
        "model.vision.mlp model.vision.patch model.vision.merge model.vision.temporal model.vision.min_pixels "
        "model.vision.max_pixels images.min_pixels images.max_pixels images.max_tokens images.max_windows images.cache_mb",
    ),
    (
        "be at least 0",
        lambda v: v >= 0,
        "seed replay.capacity loss.kl_coef loss.entropy_coef optim.warmup_steps optim.weight_decay checkpoint.keep_best "
        "eval.temperature warm_start.seed replay.extra",
    ),
    (
        "be above 0",
        lambda v: v > 0,
        "sample.temperature weight.cap replay.half_life optim.learning_rate optim.grad_clip optim.eps loss.clip_high "
        "warm_start.learning_rate model.rope_theta model.rms_eps selection.prior model.rope_scaling.factor "
        "model.rope_scaling.beta_fast model.rope_scaling.beta_slow model.rope_scaling.low_freq_factor "
        "model.rope_scaling.high_freq_factor model.lora.alpha model.rope_scaling.attention_factor "
        "verifier.seconds verifier.memory_gb batch.memory_gb",
    ),
    ("lie between 1 and 4", lambda v: 1 <= v <= 4, "batch.length_buckets"),
    ("be above 1, or null for off", lambda v: v > 1, "loss.dual_clip"),
    ("lie in (0, 1)", lambda v: 0 < v < 1, "loss.clip_low optim.b1 optim.b2"),
    ("lie in (0, 1]", lambda v: 0 < v <= 1, "sample.top_p eval.top_p selection.decay"),
    ("lie in [0, 1]", lambda v: 0 <= v <= 1, "warm_start.right selection.target"),
)
"""What a setting must do, the test, the dotted keys. None passes."""


def _broken_rules(c: Config) -> Iterator[str]:
    """A sentence for every setting that is out of range, or does not go with another."""
    values = plain.dotted(plain.to_plain(c))
    for expected, holds, keys in _RANGES:
        for key in keys.split():
            v = values[key]
            if v is not None and v != "auto" and not (math.isfinite(v) and holds(v)):
                yield f"{key} must {expected}, got {v}"
    if not c.tasks or len({t.name for t in c.tasks}) < len(c.tasks):
        yield f"tasks must name at least one task, each once, got {[t.name for t in c.tasks]}"
    for i, t in enumerate(c.tasks):
        if not (math.isfinite(t.weight) and t.weight > 0):
            yield f"tasks.{i}.weight must be above 0, got {t.weight}"
        if t.verifier is not None and not _FUNCTION.fullmatch(t.verifier):
            yield f"tasks.{i}.verifier must name a function as module:function, got {t.verifier!r}"
        if t.name == "countdown" and not all(x in t.countdown.prompt for x in ("{nums}", "{target}")):
            yield f"tasks.{i}.countdown.prompt must have {{nums}} and {{target}} in it, got {t.countdown.prompt!r}"
        if t.name == "math":
            yield from (f"tasks.{i}.{sentence}" for sentence in _broken_math(t))
    yield from _broken_relations(c)
    if c.policy.path is None and c.model.sees:
        yield from _broken_vision(c.model)


def _broken_vision(m: ModelConfig) -> Iterator[str]:
    v = m.vision
    rules = (
        (
            m.rope_scaling.kind == "none",
            f"model.rope_scaling.kind must be none with model.family qwen2_5_vl, got {m.rope_scaling.kind}",
        ),
        (m.attention_bias, "model.attention_bias must be true with model.family qwen2_5_vl, which has biases, got false"),
        (
            v.width % v.heads == 0 and v.width // v.heads % 4 == 0,
            f"model.vision.width must be a multiple of 4 x model.vision.heads ({v.heads}), got {v.width}",
        ),
        (v.window >= v.cell, f"model.vision.window must hold a cell of patch x merge ({v.cell}) pixels, got {v.window}"),
        (
            all(0 <= i < v.layers for i in v.full_layers),
            f"model.vision.full_layers must be below model.vision.layers ({v.layers}), got {list(v.full_layers)}",
        ),
        (
            len(v.mrope) == 3 and min(v.mrope) >= 0 and 2 * sum(v.mrope) == m.head_dim,
            f"model.vision.mrope must be three numbers that add up to half of model.head_dim ({m.head_dim}), got {list(v.mrope)}",
        ),
        (
            len(v.mean) == len(v.std) == 3 and min(v.std) > 0,
            f"model.vision.mean and std must be three numbers each, the latter above 0, got {list(v.mean)} and {list(v.std)}",
        ),
        (
            v.image_token is v.start_token is v.end_token is None,
            f"model.vision.image_token must be null: it is the tokenizer's, got {v.image_token}, {v.start_token}, {v.end_token}",
        ),
    )
    yield from (sentence for holds, sentence in rules if not holds)


def _broken_math(t: TaskConfig) -> Iterator[str]:
    m = t.math
    for key, low, high in (
        ("train_problems", 1, None),
        ("eval_problems", 1, None),
        ("seed", 0, None),
        ("steps", 1, 3),
        ("high", 2, 99),
    ):
        v = getattr(m, key)
        if v < low or (high is not None and v > high):
            yield f"math.{key} must {f'be at least {low}' if high is None else f'lie between {low} and {high}'}, got {v}"
    if t.eval_file is not None and t.train_file is None and m.dataset is None:
        yield f"train_file or math.dataset must be given beside eval_file, got neither beside {t.eval_file}"


def _broken_relations(c: Config) -> Iterator[str]:
    b, s, r, m, p = c.batch, c.sample, c.replay, c.model, c.algorithm.preset
    mini = c.slots // b.mini_batches * b.group_size
    slots = f"batch.prompts ({b.prompts})" + (f" + replay.extra ({r.extra})" if c.slots > b.prompts else "")
    weighs = p.slots == "replay" or c.weight.correct_sampler
    full = f"with algorithm {c.algorithm.name}, which weighs by log-probs of the full distribution"
    rules = (
        (
            b.group_size > 1,
            f"batch.group_size must be at least 2: {c.algorithm.advantages} advantages compare a group, got {b.group_size}",
        ),
        (c.slots % b.mini_batches == 0, f"batch.mini_batches must divide {slots}, got {b.mini_batches}"),
        (
            not isinstance(b.micro_batch, int) or mini % b.micro_batch == 0,
            f"batch.micro_batch must divide the rows of a mini-batch ({mini}), got {b.micro_batch}",
        ),
        (
            s.max_rows is None or s.max_rows >= b.group_size,
            f"sample.max_rows must hold a group ({b.group_size} rows), got {s.max_rows}",
        ),
        (
            c.eval.samples == 1 or c.eval.temperature > 0,
            f"eval.samples must be 1 when eval.temperature is 0, got {c.eval.samples}",
        ),
        (m.heads % m.kv_heads == 0, f"model.heads must be a multiple of model.kv_heads ({m.kv_heads}), got {m.heads}"),
        (m.head_dim > 0 and m.head_dim % 2 == 0, f"model.head_dim must be even and above 0, got {m.head_dim}"),
        (
            not m.attention_bias or m.family != "mistral",
            "model.attention_bias must be false with model.family mistral, which has no biases, got true",
        ),
        (not m.mlp_bias or m.family == "llama", f"model.mlp_bias must be false with model.family {m.family}, got true"),
        (
            m.window is None or m.family == "mistral",
            f"model.window must be null with model.family {m.family}, got {m.window}",
        ),
        (
            m.lora.rank is None or bool(m.lora.targets),
            "model.lora.targets must name at least one layer when model.lora.rank is given, got none",
        ),
        (
            len(set(m.lora.targets)) == len(m.lora.targets),
            f"model.lora.targets must name each layer once, got {', '.join(m.lora.targets)}",
        ),
        (r.max_age >= r.min_age, f"replay.max_age must be at least replay.min_age ({r.min_age}), got {r.max_age}"),
        (
            max(c.seed, c.warm_start.seed) < 2**32,
            f"seed and warm_start.seed must be below 2^32, got {c.seed}, {c.warm_start.seed}",
        ),
        (c.chat.date is None or _is_day(c.chat.date), f"chat.date must be a day as YYYY-MM-DD, got {c.chat.date!r}"),
        (not weighs or s.top_p == 1, f"sample.top_p must be 1.0 {full}, got {s.top_p}"),
        (not weighs or s.top_k is None, f"sample.top_k must be off {full}, got {s.top_k}"),
    )
    yield from (sentence for holds, sentence in rules if not holds)


def _is_day(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
