"""What is measured: shapes of the policy, of a training batch and of what is sampled, small to large."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from popo_jax import plain
from popo_jax.build import Built, build
from popo_jax.config import Config, from_dict
from popo_jax.data.tokenizer import characters
from popo_jax.rules import resolve
from popo_jax.runtime.mesh import make_mesh

ROOT = Path(__file__).parents[2]
TOKENIZER = characters()


@dataclass(frozen=True)
class Head:
    """What the case of the head alone is made of: its memory is compiled for, and its time taken of, [rows, length] tokens."""

    vocab: int = 151936
    width: int = 896
    kept: tuple[int, int] = (2, 8192)
    timed: tuple[int, int] = (4, 256)


@dataclass(frozen=True)
class Size:
    """Shapes, and how hard the machine is tried beside them."""

    name: str
    about: str
    train: Config
    """The batch of a train step."""
    sample: Config
    """What the sampler's cases sample."""
    side: int = 2048
    """Of the square matrices whose product is the machine's peak."""
    copied: int = 1 << 28
    """Bytes of the array whose copy is the machine's bandwidth."""
    seconds: float = 4.0
    """Of rounds for each case, beyond the least number of them."""
    padded: Config | None = None
    """The batch whose rows are of uneven lengths; None: rows are too short for a case."""
    head: Head | None = None
    """None: the head is too small for a case."""
    on_cpu: bool = False
    """Measured by default where there is only a CPU; the others where there is an accelerator."""


def _quick_start() -> Size:
    c = resolve(from_dict(plain.read_mapping(ROOT / "configs" / "countdown_tiny.yaml")))
    return Size("tiny", "the quick start, configs/countdown_tiny.yaml", c, c, on_cpu=True)


def _small() -> Size:
    """performance.md's: 128 rows of 96 tokens are trained, 64 rows of 32 + 64 sampled."""
    model = {"vocab_size": 128, "layers": 6, "width": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "mlp": 768}
    limits = {"max_prompt_tokens": 32, "max_response_tokens": 64}
    data: dict[str, Any] = {"model": model, "sample": limits, "eval": {"problems": 64}}
    train, sample = (resolve(from_dict(data | {"batch": {"prompts": P, "group_size": 8}})) for P in (16, 8))
    longer = data | {"sample": {"max_prompt_tokens": 64, "max_response_tokens": 320}, "batch": {"prompts": 4, "group_size": 8}}
    padded = resolve(from_dict(plain.merge(longer, {"batch": {"micro_batch": 4}})))
    about = "4.8 M parameters; the head is Qwen2.5-0.5B's"
    return Size("small", about, train, sample, padded=padded, head=Head(), on_cpu=True)


def _qwen(name: str, row: tuple[int, int], **shape: Any) -> Size:
    """A Qwen2.5 in bfloat16, 16 rows of `row` (prompt, response) tokens trained, 256 rows of 512 + 512 sampled."""
    model = {"rope_theta": 1e6, "dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full"} | shape
    batch = {"prompts": 4, "group_size": 4, "micro_batch": 1}
    limits = {"max_prompt_tokens": row[0], "max_response_tokens": row[1], "chunk": 64}
    train = resolve(from_dict({"model": model, "batch": batch, "sample": limits}))
    limits = {"max_prompt_tokens": 512, "max_response_tokens": 512, "chunk": 32}
    sample = resolve(from_dict({"model": model, "batch": {"prompts": 32, "group_size": 8}, "sample": limits}))
    return Size(
        name,
        f"Qwen2.5-{name.upper()}, random weights",
        train,
        sample,
        padded=train,
        head=Head(shape["vocab_size"], shape["width"]),
        **LARGE,
    )


LARGE: Mapping[str, Any] = {"side": 8192, "copied": 1 << 32, "seconds": 10.0}
_0_5B = {"vocab_size": 151936, "layers": 24, "width": 896, "heads": 14, "kv_heads": 2, "head_dim": 64, "mlp": 4864}
_1_5B = {"vocab_size": 151936, "layers": 28, "width": 1536, "heads": 12, "kv_heads": 2, "head_dim": 128, "mlp": 8960}
_7B = {"vocab_size": 152064, "layers": 28, "width": 3584, "heads": 28, "kv_heads": 4, "head_dim": 128, "mlp": 18944}

SIZES: Mapping[str, Size] = {
    size.name: size
    for size in (
        _quick_start(),
        _small(),
        _qwen("0.5b", (1024, 7168), **_0_5B),
        _qwen("1.5b", (1024, 7168), **_1_5B),
        _qwen("7b", (512, 1536), tie_embeddings=False, **_7B),
    )
}


def defaults(platform: str) -> list[str]:
    """Sizes of a plain `popo bench`: those for a CPU, or the one that the aims for accelerators speak of."""
    return [name for name, size in SIZES.items() if size.on_cpu] if platform == "cpu" else ["1.5b"]


def built(c: Config, devices: int) -> Built:
    """The compiled side of `c`; on several accelerators its weights are split, and a micro-batch has a row for each."""
    vocab = c.model.vocab_size or TOKENIZER.vocab_size
    if isinstance(c.batch.micro_batch, int):
        batch = dataclasses.replace(c.batch, micro_batch=c.batch.micro_batch * devices)
        c = resolve(dataclasses.replace(c, batch=batch, mesh=dataclasses.replace(c.mesh, fsdp=devices)))
    return build(c, dataclasses.replace(c.model, vocab_size=vocab), eos_ids=TOKENIZER.eos_ids, mesh=make_mesh(c))


def prompts(c: Config, vocab: int) -> Sequence[np.ndarray]:
    """P random prompts of the longest length, without the end token."""
    ids = np.setdiff1d(np.arange(vocab, dtype=np.int32), TOKENIZER.eos_ids)
    return list(np.random.default_rng(0).choice(ids, (c.batch.prompts, c.sample.max_prompt_tokens)))
