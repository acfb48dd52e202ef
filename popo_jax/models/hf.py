"""Checkpoints in Hugging Face's folder format, loaded and saved through one table of names (`families`).

Loading reads tensor by tensor straight into sharded device arrays: the host never holds more than a layer of one weight.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from jax.sharding import Sharding, SingleDeviceSharding

from popo_jax.model_config import ModelConfig
from popo_jax.models.decoder import Decoder, Params
from popo_jax.models.families import FAMILIES
from popo_jax.models.hf_config import read_config, save_config
from popo_jax.models.json_files import write_json
from popo_jax.models.stored import INDEX, SINGLE, Stored, read, some, tensors
from popo_jax.types import UserError

__all__ = ["load", "read_config", "save", "save_config", "save_weights"]

NOT_WEIGHTS = ("rotary_emb.inv_freq",)
"""Endings of names that early checkpoints hold besides their weights."""


class Entry(NamedTuple):
    """One tensor of a checkpoint: its name there, where it lives here (layer None: not stacked), its shape there."""

    name: str
    path: str
    layer: int | None
    shape: tuple[int, ...]


def load(folder: epath.PathLike, c: ModelConfig, shardings: Params | None = None) -> Params:
    """Parameters of shape `c` from a folder's safetensors, one file or shards, stored in any float type.

    shardings: a tree like the parameters; None: all on the first device. A tied checkpoint may hold lm_head.weight besides
    (not read); without attention_bias it may hold biases of 0. Errors: UserError for no weights, an unreadable file, and all
    misfitting names, shapes and types together.
    """
    abstract = _abstract(c)
    if shardings is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), abstract)
    where = _flat(shardings)
    with tensors(folder) as stored:
        stored = {_name(name, c): tensor for name, tensor in stored.items()}
        entries: dict[str, list[Entry]] = {}
        for e in _entries(c):
            entries.setdefault(e.path, []).append(e)
        _check([e for group in entries.values() for e in group], stored, folder, c)
        _refuse_biases(stored, folder, c)
        flat = {
            path: _place([stored[e.name] for e in entries[path]], path, x, where[path]) for path, x in _flat(abstract).items()
        }
    return jax.tree.unflatten(jax.tree.structure(abstract), list(flat.values()))


def _place(parts: Sequence[Stored], path: str, x: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
    """One weight on its devices; a part that several hold is read once."""
    first: dict[str, jax.Array] = {}
    shards = []
    for device, index in sharding.addressable_devices_indices_map(x.shape).items():
        assert index is not None
        known = first.get(str(index))
        shards.append(_shard(parts, path, x, index, device) if known is None else jax.device_put(known, device))
        first.setdefault(str(index), shards[-1])
    return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)


def _shard(
    parts: Sequence[Stored], path: str, x: jax.ShapeDtypeStruct, index: tuple[slice, ...], device: jax.Device
) -> jax.Array:
    """The part of a weight at `index`; stacked blocks are written into their place one by one."""
    stacked = _stacked(path)
    rest = index[1:] if stacked else index
    shape = tuple(len(range(*s.indices(n))) for s, n in zip(rest, x.shape[stacked:], strict=True))

    def tensor(s: Stored) -> np.ndarray:
        out = _aligned(shape, x.dtype)
        read(s, rest[::-1] if _transposed(path) else rest, out.T if _transposed(path) else out)
        return out

    if not stacked:
        return jax.device_put(tensor(parts[0]), device)
    whole = jnp.zeros((len(parts), *shape), x.dtype, device=device)
    for i, s in enumerate(parts):
        whole = jax.block_until_ready(_write(whole, tensor(s), i))
    return whole


@functools.partial(jax.jit, donate_argnums=0)
def _write(whole: jax.Array, x: jax.Array, i: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(whole, x, i, 0)


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array that a CPU device takes over without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


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
    """Weights in `param_dtype` and the two configs, so that transformers loads the folder with no missing or unexpected name."""
    save_weights(folder, params, c, max_shard_bytes=max_shard_bytes)
    save_config(folder, c, eos_ids=eos_ids, pad_id=pad_id, bos_id=bos_id)


def save_weights(folder: epath.PathLike, params: Params, c: ModelConfig, *, max_shard_bytes: float = 5e9) -> None:
    """safetensors in `param_dtype`, with an index beyond one file; fetched from the devices a file at a time.

    transformers' Qwen2 always has q/k/v biases: without attention_bias they are written as 0.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = _flat(params)
    expected = {e.path for e in _entries(c)}
    if set(flat) != expected:
        raise ValueError(f"save: the config and the parameters differ in {sorted(set(flat) ^ expected)}")
    dtype = np.dtype(c.param_dtype)
    there = dataclasses.replace(c, attention_bias=True) if c.family == "qwen2" else c
    shards = _shards(list(_entries(there)), dtype.itemsize, max_shard_bytes)
    files = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        tensors = {e.name: _outward(flat, e, dtype) for e in shard}
        (folder / file).write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    (folder / (INDEX if len(shards) == 1 else SINGLE)).unlink(missing_ok=True)  # what an earlier save left would be read first
    if len(shards) > 1:
        weight_map = {e.name: file for file, shard in zip(files, shards, strict=True) for e in shard}
        total = sum(int(np.prod(e.shape)) for shard in shards for e in shard) * dtype.itemsize
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


@functools.cache
def _abstract(c: ModelConfig) -> Params:
    return jax.eval_shape(Decoder(dataclasses.replace(c, linear="plain", attention="xla")).init, jax.random.key(0))


def _flat(params: Params) -> dict[str, Any]:
    return {"/".join(k.key for k in path): x for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}


def _transposed(path: str) -> bool:
    return path.endswith("/kernel")


def _stacked(path: str) -> bool:
    return "layers/" in path


def _name(name: str, c: ModelConfig) -> str:
    """Of a checkpoint's tensor, as the family's table has it."""
    return next((new + name.removeprefix(old) for old, new in FAMILIES[c.family].renamed.items() if name.startswith(old)), name)


def _entries(c: ModelConfig) -> Iterator[Entry]:
    """Every tensor of a checkpoint of shape `c`, layer by layer."""
    flat, names = {path: x.shape for path, x in _flat(_abstract(c)).items()}, FAMILIES[c.family].names

    def entry(path: str, layer: int | None) -> Entry:
        shape = flat[path] if layer is None else flat[path][1:]
        return Entry(names[path].format(layer), path, layer, shape[::-1] if _transposed(path) else shape)

    def layers(stack: str, n: int) -> Iterator[Entry]:
        return (entry(path, layer) for layer in range(n) for path in names if path in flat and path.startswith(stack))

    yield entry("embed/embedding", None)
    yield from layers("layers/", c.layers)
    yield from (entry(path, None) for path in ("norm/scale", "head/kernel") if path in flat)
    yield from layers("vision/layers/", c.vision.layers)
    yield from (entry(path, None) for path in names if path in flat and path.startswith("vision/") and not _stacked(path))


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


def _outward(flat: Mapping[str, Any], e: Entry, dtype: np.dtype) -> np.ndarray:
    if e.path not in flat:
        return np.zeros(e.shape, dtype)
    x = np.asarray(flat[e.path] if e.layer is None else flat[e.path][e.layer])
    return np.ascontiguousarray(x.T if _transposed(e.path) else x, dtype)


def _optional(c: ModelConfig) -> set[str]:
    """Names a checkpoint of shape `c` may hold besides its own."""
    wide = _entries(dataclasses.replace(c, attention_bias=True, tie_embeddings=False))
    return {e.name for e in wide} - {e.name for e in _entries(c)}


def _check(entries: Sequence[Entry], stored: Mapping[str, Stored], folder: epath.PathLike, c: ModelConfig) -> None:
    missing = [e.name for e in entries if e.name not in stored]
    unexpected = sorted(set(stored) - {e.name for e in entries} - _optional(c))
    unexpected = [name for name in unexpected if not name.endswith(NOT_WEIGHTS)]
    held = [(e, stored[e.name]) for e in entries if e.name in stored]
    shapes = [f"{e.name} {list(s.shape)} instead of {list(e.shape)}" for e, s in held if s.shape != e.shape]
    dtypes = [f"{e.name} {s.dtype}" for e, s in held if s.dtype not in ("F64", "F32", "F16", "BF16")]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes, "not of a float type": dtypes}
    wrong = [f"{kind}: {some(names)}" for kind, names in kinds.items() if names]
    if wrong:
        raise UserError(f"{folder}: the weights do not fit config.json; {'; '.join(wrong)}")


def _refuse_biases(stored: Mapping[str, Stored], folder: epath.PathLike, c: ModelConfig) -> None:
    for name in sorted(_optional(c) & set(stored)):
        if name.endswith(".bias"):
            bias = np.empty(stored[name].shape, np.float32)
            read(stored[name], [slice(None)], bias)
            if np.any(bias):
                raise UserError(f"{folder}: {name} must be 0 where config.json says attention_bias false, got other values")
