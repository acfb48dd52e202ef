"""How many rows of a batch the train step takes at once: what a platform suits, or the most that fit into memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from popo_jax.config import Config
from popo_jax.types import UserError

CPU_TOKENS = 4096
"""Of a micro-batch on a CPU: what is saved for the backward pass then stays near the caches, and no fresh pages are needed."""
DEVICE_TOKENS = 32768
"""Of a micro-batch on each accelerator: enough to keep it busy. More rows at once would be longer on average, and padded more."""
GIB = 2**30


def split_for(platform: str, c: Config, shards: int) -> Config:
    """`c` with `batch.micro_batch` decided, unless it is given: as many rows as make CPU_TOKENS or DEVICE_TOKENS."""
    return c if isinstance(c.batch.micro_batch, int) else with_micro(c, possible(c, shards, platform)[-1])


def fitted(platform: str, c: Config, shards: int, needs: Callable[[Config], int], limit: int) -> Config:
    """`c` with the largest micro-batch, up to that of `split_for`, for which the compiled step `needs` at most `limit` bytes.

    A bisection: as many compilations as the number of sizes has bits. Errors: UserError if not even the smallest fits.
    """
    sizes = possible(c, shards, platform)
    least = needs(with_micro(c, sizes[0]))
    if least > limit:
        raise UserError(
            f"batch.micro_batch auto: a train step of {sizes[0]} rows at once must fit into {limit / GIB:.3g} GiB of a device, "
            f"got {least / GIB:.3g}; split the weights over more devices (mesh.fsdp), set model.remat full, or shorten the rows"
        )
    fits, beyond = 0, len(sizes)
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        fits, beyond = (middle, beyond) if needs(with_micro(c, sizes[middle])) <= limit else (fits, middle)
    return with_micro(c, sizes[fits])


def memory(c: Config, device_bytes: int | None) -> int:
    """Bytes of a device that the train step may take: `batch.memory_gb`, else nine tenths of what it has. Errors: UserError."""
    if c.batch.memory_gb is not None:
        return int(c.batch.memory_gb * GIB)
    if device_bytes is None:
        raise UserError(
            "batch.memory_gb must be given with batch.micro_batch auto where the device does not tell its memory, got none"
        )
    return int(0.9 * device_bytes)


def possible(c: Config, shards: int, platform: str) -> list[int]:
    """Micro-batches that divide a mini-batch's rows, have as many on each of `shards`, and no more tokens than the platform's.

    Ascending; the smallest of them has any number of tokens, and is the whole mini-batch where `shards` divide none.
    """
    mini = c.rows // c.batch.mini_batches
    tokens = CPU_TOKENS if platform == "cpu" else DEVICE_TOKENS * shards
    sizes = [n for n in range(1, mini + 1) if mini % n == 0 and n % shards == 0] or [mini]
    return [n for n in sizes if n * c.row_tokens <= tokens] or sizes[:1]


def with_micro(c: Config, rows: int) -> Config:
    return dataclasses.replace(c, batch=dataclasses.replace(c.batch, micro_batch=rows))
