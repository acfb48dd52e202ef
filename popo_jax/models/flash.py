"""Attention over whole rows, of the kind that `model.attention` names, on one device or on a mesh: causal, or within segments.

Text rows start at position 0 and are padded on the right, so causal attention needs no padding mask; images are segments of a row
of patches. `xla` makes all the scores; `cudnn` (causal alone) and `splash` are flash kernels (arXiv:2205.14135): what they keep
for the backward pass grows with T, not with T squared. Letters as in attention.py; head-major in and out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from popo_jax.model_config import ModelConfig
from popo_jax.models.attention import attention
from popo_jax.models.kv_cache import visible
from popo_jax.sharding import ROW_AXES
from popo_jax.types import UserError

Kernel = Callable[..., Array]
"""(q_BKRTH, k_BKTH, v_BKTH) -> out_BKRTH; within segments, segments_BT (int32) come last."""
CUDNN_HEAD_DIM = 128
"""Largest that cuDNN's flash attention takes on every GPU it runs on, in steps of 8."""
LANES = 128
BLOCKS = (512, 256, LANES)
"""Positions of a tile of scores, the best first; the TPU's vectors have 128 lanes."""
NO_SEGMENT, TILE_PADDING = -1, -2
"""Segments of a row's padding, and of what a kernel adds to it."""


def resolve_attention(c: ModelConfig, platform: str) -> ModelConfig:
    """`c` with `attention: auto` decided for a platform ("cpu", "gpu", "tpu"). Errors: UserError if a chosen kind cannot work.

    Auto takes the flash kernels in bfloat16 alone: cuDNN has no other, and splash multiplies float32 in the hardware's default
    precision, which is less.
    """
    cudnn = (
        (platform == "gpu", f"model.attention cudnn must run on a GPU, got {platform}"),
        (c.dtype == "bfloat16", f"model.attention cudnn must have model.dtype bfloat16, got {c.dtype}"),
        (
            c.head_dim % 8 == 0 and c.head_dim <= CUDNN_HEAD_DIM,
            f"model.attention cudnn must have a model.head_dim that is a multiple of 8 up to {CUDNN_HEAD_DIM}, got {c.head_dim}",
        ),
    )
    splash = ((platform != "gpu", f"model.attention splash must run on a TPU, or interpreted on a CPU, got {platform}"),)
    if c.attention == "auto":
        flash = "splash" if platform == "tpu" and c.dtype == "bfloat16" else "xla"
        return dataclasses.replace(c, attention="cudnn" if all(holds for holds, _ in cudnn) else flash)  # type: ignore[arg-type]
    for holds, sentence in {"cudnn": cudnn, "splash": splash}.get(c.attention, ()):
        if not holds:
            raise UserError(sentence)
    return c


def causal(c: ModelConfig, mesh: Mesh | None) -> Kernel:
    """softmax(q k' / sqrt(H)) v over the keys up to the query's own position, the last `c.window` of them; softmax in float32.

    mesh: where it runs; None: one device. The compiler splits `xla` itself.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    kernel = partial(CAUSAL[c.attention], window=c.window, platform=platform)
    return kernel if mesh is None or mesh.size == 1 or c.attention == "xla" else partial(_spread, kernel, mesh)


def within(c: ModelConfig, mesh: Mesh | None, *, local: bool = False) -> Kernel:
    """softmax(q k' / sqrt(H)) v over all keys of the query's own segment, before it and after it. Padding is a segment, too.

    Splash where `c.attention` says so, else xla: jax's call of cuDNN takes no segments. local: within a program of one shard.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    splash = c.attention == "splash"
    kernel = partial(_splash if splash else _xla, causal=False, window=None, platform=platform)
    if mesh is None or mesh.size == 1 or not splash:
        return kernel
    return partial(_spread_heads, kernel, mesh) if local else partial(_spread, kernel, mesh)


def _xla(
    q_BKRTH: Array,
    k_BKTH: Array,
    v_BKTH: Array,
    segments_BT: Array | None = None,
    *,
    window: int | None,
    platform: str,
    causal: bool = True,
) -> Array:
    T = k_BKTH.shape[2]
    mask = visible(jnp.zeros(1, jnp.int32), jnp.arange(T), T, window)[0] if causal else jnp.ones((T, T), bool)
    if segments_BT is not None:
        mask &= segments_BT[:, :, None] == segments_BT[:, None, :]
    return attention(q_BKRTH, k_BKTH, v_BKTH, mask)


def _cudnn(
    q_BKRTH: Array,
    k_BKTH: Array,
    v_BKTH: Array,
    *,
    window: int | None,
    platform: str,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:
    """jax's own wrapper, which wants [B, T, N, H]; its implementation "xla" computes the same anywhere."""
    B, K, R, T, H = q_BKRTH.shape
    q_BTNH = q_BKRTH.reshape(B, K * R, T, H).swapaxes(1, 2)
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BKTH.swapaxes(1, 2),
        v_BKTH.swapaxes(1, 2),
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return out_BTNH.swapaxes(1, 2).reshape(B, K, R, T, H)


def _splash(
    q_BKRTH: Array,
    k_BKTH: Array,
    v_BKTH: Array,
    segments_BT: Array | None = None,
    *,
    window: int | None,
    platform: str,
    causal: bool = True,
) -> Array:
    """The Pallas kernel for one key head and its queries, over all rows and key heads; interpreted on a CPU.

    T is padded to whole tiles: nothing before sees what follows it, by order or as another segment.
    """
    B, K, R, T, H = q_BKRTH.shape
    block, padded = tile(T)
    q_BKRTH = q_BKRTH * jnp.asarray(H**-0.5, q_BKRTH.dtype)  # the kernel does not scale
    q, k, v = (
        jnp.pad(x.reshape(B * K, *x.shape[2:]), [(0, 0)] * (x.ndim - 3) + [(0, padded - T), (0, 0)])
        for x in (q_BKRTH, k_BKTH, v_BKTH)
    )
    kernel = _splash_kernel(R, padded, block, window, causal=causal, interpret=platform == "cpu")
    if segments_BT is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        of_head = jnp.repeat(jnp.pad(segments_BT, ((0, 0), (0, padded - T)), constant_values=TILE_PADDING), K, axis=0)
        out = jax.vmap(lambda q, k, v, s: kernel(q, k, v, _segment_ids(s)))(q, k, v, of_head)
    return out[..., :T, :].reshape(B, K, R, T, H)


def _segment_ids(segments: Array) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    return pallas.SegmentIds(segments, segments)


def _splash_kernel(R: int, T: int, block: int, window: int | None, *, causal: bool, interpret: bool) -> Kernel:
    """(q [R, T, H], k [T, H], v [T, H]) -> out [R, T, H], made for its mask: tiles where nothing is seen are left out."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas  # experimental: only who uses it depends on it

    if not causal:
        mask: Any = pallas.FullMask((T, T))
    else:
        mask = pallas.CausalMask((T, T)) if window is None else pallas.LocalMask((T, T), (window - 1, 0), offset=0)
    forward = ("block_q", "block_kv", "block_kv_compute")
    backward = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    sizes = pallas.BlockSizes(**dict.fromkeys(forward + backward, block))  # type: ignore[arg-type]
    heads = pallas.MultiHeadMask([mask] * R)
    return pallas.make_splash_mqa_single_device(heads, block_sizes=sizes, interpret=interpret)


def tile(T: int) -> tuple[int, int]:
    """(positions of a tile, T padded to whole tiles): the largest tile that adds at most an eighth to T, else the smallest."""
    block = next((b for b in BLOCKS if -T % b <= T // 8), LANES)
    return block, T + -T % block


def _spread(kernel: Kernel, mesh: Mesh, q_BKRTH: Array, k_BKTH: Array, v_BKTH: Array, *segments_BT: Array) -> Array:
    """`kernel` on every device's own rows and heads: the compiler would have each compute all of a kernel's call."""
    q, kv = specs(q_BKRTH.shape[:3], mesh.shape)
    rows = tuple(PartitionSpec(q[0]) for _ in segments_BT)
    return jax.shard_map(kernel, mesh=mesh, in_specs=(q, kv, kv, *rows), out_specs=q, check_vma=False)(
        q_BKRTH, k_BKTH, v_BKTH, *segments_BT
    )


def _spread_heads(kernel: Kernel, mesh: Mesh, q_BKRTH: Array, k_BKTH: Array, v_BKTH: Array, segments_BT: Array) -> Array:
    """The same in a program of one shard of the rows, where heads alone are left to be divided."""
    q, kv = (PartitionSpec(None, *spec[1:]) for spec in specs(q_BKRTH.shape[:3], mesh.shape))
    divided = jax.shard_map(kernel, in_specs=(q, kv, kv, PartitionSpec()), out_specs=q, axis_names={"tensor"}, check_vma=False)
    return divided(q_BKRTH, k_BKTH, v_BKTH, segments_BT)


def specs(shape: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[PartitionSpec, PartitionSpec]:
    """How queries [B, K, R, ..] and keys [B, K, ..] are split over a mesh's axes.

    Rows go over as many of (data, fsdp) as divide them; key heads over tensor, else each one's queries, else neither.
    """
    B, K, R = shape
    fits = [axes for axes in (ROW_AXES, ROW_AXES[:1], ROW_AXES[1:], ()) if B % math.prod(sizes[a] for a in axes) == 0]
    rows = max(fits, key=lambda axes: math.prod(sizes[a] for a in axes)) or None
    by_key = K % sizes["tensor"] == 0
    keys, queries = "tensor" if by_key else None, None if by_key or R % sizes["tensor"] else "tensor"
    return PartitionSpec(rows, keys, queries), PartitionSpec(rows, keys)


CAUSAL: Mapping[str, Kernel] = {"xla": _xla, "cudnn": _cudnn, "splash": _splash}
"""Kind -> (q_BKRTH, k_BKTH, v_BKTH, *, window, platform) -> out_BKRTH."""
