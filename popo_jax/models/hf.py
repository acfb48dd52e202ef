"""Qwen2 checkpoints in Hugging Face's folder format, loaded and saved through one table of names.

Arrays here are numpy, on the host, in `param_dtype`; the caller places them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from popo_jax.config import ModelConfig
from popo_jax.models.decoder import Decoder, Params
from popo_jax.models.hf_config import read_config, read_json, save_config, write_json
from popo_jax.types import UserError

__all__ = ["NAMES", "load", "read_config", "save", "save_config"]

NAMES: Mapping[str, str] = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attn_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/attn/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attn/q/bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/attn/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attn/k/bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/attn/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attn/v/bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/attn/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
"""Path in our parameters -> name in the checkpoint, {} the layer. Kernels are [in, out] here and [out, in] there."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LISTED = 4
"""How many names an error spells out."""


class Entry(NamedTuple):
    """One tensor of a checkpoint: its name there, where it lives here (layer None: not stacked), its shape there."""

    name: str
    path: str
    layer: int | None
    shape: tuple[int, ...]


class Stored(NamedTuple):
    """One tensor of a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def load(folder: epath.PathLike, c: ModelConfig) -> Params:
    """Parameters of shape `c` from a folder's safetensors, one file or shards, stored in any float type.

    A tied checkpoint may hold lm_head.weight besides (not read); without attention_bias it may hold biases of 0.
    Errors: UserError for no weights, an unreadable file, and all misfitting names, shapes and types together.
    """
    with _local(epath.Path(folder)) as local:
        stored = _open(_weight_files(epath.Path(folder), local), folder)
        entries = list(_entries(c))
        _check(entries, stored, folder, c)
        params = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), _abstract(c))
        flat = _flat(params)
        by_file: dict[Path, list[Entry]] = {}
        for entry in entries:
            by_file.setdefault(stored[entry.name].file, []).append(entry)
        for file, inside in by_file.items():
            with safetensors.safe_open(file, framework="np") as f:
                for e in inside:
                    tensor = f.get_tensor(e.name)
                    whole = flat[e.path]
                    (whole if e.layer is None else whole[e.layer])[...] = tensor.T if _transposed(e.path) else tensor
        _refuse_biases(stored, folder, c)
    return params


def save(
    folder: epath.PathLike,
    params: Params,
    c: ModelConfig,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    bos_id: int | None = None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Weights in `param_dtype` and the two configs, so that transformers loads the folder with no missing or unexpected name.

    transformers' Qwen2 always has q/k/v biases: without attention_bias they are written as 0.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = {path: np.asarray(x) for path, x in _flat(params).items()}
    expected = {e.path for e in _entries(c)}
    if set(flat) != expected:
        raise ValueError(f"save: the config and the parameters differ in {sorted(set(flat) ^ expected)}")
    dtype = np.dtype(c.param_dtype)
    shards = _shards(list(_entries(dataclasses.replace(c, attention_bias=True))), dtype.itemsize, max_shard_bytes)
    files = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        tensors = {e.name: _outward(flat, e, dtype) for e in shard}
        (folder / file).write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    (folder / (INDEX if len(shards) == 1 else SINGLE)).unlink(missing_ok=True)  # what an earlier save left would be read first
    if len(shards) > 1:
        weight_map = {e.name: file for file, shard in zip(files, shards, strict=True) for e in shard}
        total = sum(int(np.prod(e.shape)) for shard in shards for e in shard) * dtype.itemsize
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    save_config(folder, c, eos_ids=eos_ids, pad_id=pad_id, bos_id=bos_id)


@functools.cache
def _abstract(c: ModelConfig) -> Params:
    return jax.eval_shape(Decoder(dataclasses.replace(c, linear="plain")).init, jax.random.key(0))


def _flat(params: Params) -> dict[str, Any]:
    return {"/".join(k.key for k in path): x for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}


def _transposed(path: str) -> bool:
    return path.endswith("/kernel")


def _entries(c: ModelConfig) -> Iterator[Entry]:
    """Every tensor of a checkpoint of shape `c`, layer by layer."""
    flat = {path: x.shape for path, x in _flat(_abstract(c)).items()}

    def entry(path: str, layer: int | None) -> Entry:
        shape = flat[path] if layer is None else flat[path][1:]
        return Entry(NAMES[path].format(layer), path, layer, shape[::-1] if _transposed(path) else shape)

    yield entry("embed/embedding", None)
    for layer in range(c.layers):
        yield from (entry(path, layer) for path in NAMES if path in flat and path.startswith("layers/"))
    yield from (entry(path, None) for path in ("norm/scale", "head/kernel") if path in flat)


def _shards(entries: Sequence[Entry], itemsize: int, limit: float) -> list[list[Entry]]:
    """The entries in order, cut so that no file exceeds `limit` bytes unless one tensor does."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for e in entries:
        n = int(np.prod(e.shape)) * itemsize
        if shards[-1] and size + n > limit:
            shards.append([])
            size = 0
        shards[-1].append(e)
        size += n
    return shards


def _outward(flat: Mapping[str, np.ndarray], e: Entry, dtype: np.dtype) -> np.ndarray:
    if e.path not in flat:
        return np.zeros(e.shape, dtype)
    x = flat[e.path] if e.layer is None else flat[e.path][e.layer]
    return np.ascontiguousarray(x.T if _transposed(e.path) else x, dtype)


def _weight_files(folder: epath.Path, local: Path) -> list[Path]:
    if (folder / SINGLE).exists():
        return [local / SINGLE]
    if not (folder / INDEX).exists():
        raise UserError(f"{folder}: no weights, expected {SINGLE} or {INDEX}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{folder / INDEX}: weight_map must map names to files, got {type(weight_map).__name__}")
    files = sorted(set(weight_map.values()))
    absent = [f for f in files if not (folder / f).exists()]
    if absent:
        raise UserError(f"{folder}: {INDEX} names {_some(absent)}, which {'is' if len(absent) == 1 else 'are'} not there")
    return [local / f for f in files]


def _open(files: Sequence[Path], folder: epath.PathLike) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="np") as f:
                for name in f.keys():  # noqa: SIM118 (not a mapping)
                    part = f.get_slice(name)
                    stored[name] = Stored(file, tuple(part.get_shape()), part.get_dtype())
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{folder}/{file.name}: not a whole safetensors file ({error})") from None
    return stored


def _optional(c: ModelConfig) -> set[str]:
    """Names a checkpoint of shape `c` may hold besides its own."""
    wide = _entries(dataclasses.replace(c, attention_bias=True, tie_embeddings=False))
    return {e.name for e in wide} - {e.name for e in _entries(c)}


def _check(entries: Sequence[Entry], stored: Mapping[str, Stored], folder: epath.PathLike, c: ModelConfig) -> None:
    missing = [e.name for e in entries if e.name not in stored]
    unexpected = sorted(set(stored) - {e.name for e in entries} - _optional(c))
    held = [(e, stored[e.name]) for e in entries if e.name in stored]
    shapes = [f"{e.name} {list(s.shape)} instead of {list(e.shape)}" for e, s in held if s.shape != e.shape]
    dtypes = [f"{e.name} {s.dtype}" for e, s in held if s.dtype not in ("F64", "F32", "F16", "BF16")]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes, "not of a float type": dtypes}
    wrong = [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]
    if wrong:
        raise UserError(f"{folder}: the weights do not fit config.json; {'; '.join(wrong)}")


def _refuse_biases(stored: Mapping[str, Stored], folder: epath.PathLike, c: ModelConfig) -> None:
    for name in sorted(_optional(c) & set(stored)):
        if name.endswith(".bias"):
            with safetensors.safe_open(stored[name].file, framework="np") as f:
                if np.any(f.get_tensor(name)):
                    raise UserError(f"{folder}: {name} must be 0 where config.json says attention_bias false, got other values")


def _some(names: Sequence[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


@contextlib.contextmanager
def _local(folder: epath.Path) -> Iterator[Path]:
    """The folder itself, or a copy of its weights where it lies in a bucket: safetensors reads files only."""
    if "://" not in str(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as copy:
        for file in folder.glob("*.safetensors"):
            file.copy(Path(copy) / file.name)
        yield Path(copy)
