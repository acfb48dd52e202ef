"""Config + mesh -> model, optimizer, jitted train step, sampler, abstract state. No data, no tasks.

The one place where training programs are jitted: `popo plan` and the benchmarks compile the very same functions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from popo_jax import sharding
from popo_jax.config import Config
from popo_jax.model_config import ModelConfig
from popo_jax.models import hf, lora
from popo_jax.models.decoder import Decoder, resolved
from popo_jax.rl import update
from popo_jax.rl.optim import make_tx
from popo_jax.rl.state import Batch, Params, StepOut, TrainState, abstract_batch, batch_specs, sizes_of
from popo_jax.rl.supervised import supervised_step
from popo_jax.runtime import mesh as meshes
from popo_jax.sampling.sampler import Decoding, Sampler
from popo_jax.scenes import Images, Sizes
from popo_jax.split import fitted, memory, split_for
from popo_jax.types import UserError


@dataclass(frozen=True, eq=False)
class Built:
    """The compiled side of a run."""

    c: Config
    split: Config
    """`c` with `batch.micro_batch` decided: how the train step takes a batch apart."""
    mesh: Mesh
    model: Decoder
    tx: optax.GradientTransformation
    eos_ids: tuple[int, ...]
    abstract_state: TrainState
    """ShapeDtypeStructs with shardings."""
    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepOut]]
    """Donates the state."""
    score: Callable[..., jax.Array]
    """(params, tokens [B, T], images [B, ..] if the policy sees, on the mesh) -> log-probs [B, T] at the sampling temperature,
    for any B of its row shards."""

    @property
    def shardings(self) -> Params:
        """Of the parameters."""
        return jax.tree.map(lambda x: x.sharding, self.abstract_state.params)

    def fresh_params(self, key: jax.Array) -> Params:
        return jax.jit(self.model.init, out_shardings=self.shardings)(key)

    def load(self, folder: epath.PathLike, key: jax.Array) -> Params:
        """A checkpoint's parameters on the mesh; LoRA's adapters are drawn with `key` and do nothing yet."""
        shardings, frozen = lora.split(self.shardings, self.model.c)
        params = hf.load(folder, lora.without(self.model.c), frozen or shardings)
        if not frozen:
            return params
        fresh = jax.jit(lambda key: lora.split(self.model.init(key), self.model.c)[0], out_shardings=shardings)
        return lora.join(fresh(key), params)

    def state(self, params: Params) -> TrainState:
        """A state at step 0 around placed `params`, which it takes over: the train step donates them."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        trained, _ = lora.split(params, self.model.c)
        step = meshes.place(np.zeros((), np.int32), self.mesh, PartitionSpec())
        return TrainState(step, params, jax.jit(self.tx.init, out_shardings=shardings.opt_state)(trained))

    def sampler(
        self, *, samples: int, temperature: float, top_p: float = 1.0, top_k: int | None = None, sizes: Sizes | None = None
    ) -> Sampler:
        """For evaluation any samples and temperature; rows at once are those of training. sizes: the most that a prompt shows;
        None: what `images` says."""
        s = self.c.sample
        rows = s.max_rows if s.max_rows is not None else self.c.batch.prompts * self.c.batch.group_size
        limits = (s.max_prompt_tokens, s.max_response_tokens, s.chunk, rows)
        c = Decoding(samples, temperature, top_k, top_p, *limits, self.eos_ids, sizes or sizes_of(self.c, self.model.c))
        return Sampler(self.model, c, self.mesh)

    def rollout_sampler(self) -> Sampler:
        s = self.c.sample
        return self.sampler(samples=self.c.batch.group_size, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k)


def build(c: Config, model_config: ModelConfig, *, eos_ids: tuple[int, ...], mesh: Mesh, fit: bool = False) -> Built:
    """Everything compiled for one policy on one mesh; nothing is compiled yet, but for `batch.micro_batch` auto.

    fit: decide that by compiling train steps until the largest is found that fits; else auto is as good as none given.
    Errors: UserError if rows do not shard, nothing fits, or the chosen attention cannot run there.
    """
    shards, device = sharding.row_shards(mesh.shape), mesh.devices.flat[0]
    if c.rows % shards:
        raise UserError(
            f"mesh: data x fsdp ({shards}) must divide the rows of a batch ({c.slots} groups x batch.group_size), got {c.rows}"
        )
    model = Decoder(resolved(model_config, device.platform), row_shards=shards, mesh=mesh)
    tx = make_tx(c.optim)
    abstract = abstract_state(model, tx, mesh)
    state_shardings = jax.tree.map(lambda x: x.sharding, abstract)
    rows, replicated = NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, PartitionSpec())
    spoken = replicated if mesh.is_multi_process else rows  # every process stores all groups

    def train_step(split: Config) -> Any:
        return jax.jit(
            functools.partial(update.train_step, model=model, tx=tx, c=split),
            in_shardings=(state_shardings, jax.tree.map(lambda s: NamedSharding(mesh, s), batch_specs())),
            out_shardings=(state_shardings, StepOut(replicated, spoken)),  # type: ignore[arg-type]
            donate_argnums=0,
        )

    reference = shard_bytes(abstract.params) if c.loss.kl_coef else 0

    def needs(split: Config) -> int:
        return reference + device_bytes(train_step(split).lower(abstract, abstract_batch(split, model.c)).compile())

    if fit and c.batch.micro_batch == "auto":
        stats = jax.local_devices()[0].memory_stats() or {}
        split = fitted(device.platform, c, shards, needs, memory(c, stats.get("bytes_limit")))
    else:
        split = split_for(device.platform, c, shards)
    score = _scorer(split, model, state_shardings.params, mesh, spoken)
    return Built(c, split, mesh, model, tx, eos_ids, abstract, train_step(split), score)


def shard_bytes(tree: Any) -> int:
    """Bytes that a tree of ShapeDtypeStructs with shardings takes of each device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def device_bytes(compiled: Any) -> int:
    """Bytes a compiled program needs on each device while it runs: arguments, results that are no donated argument, the rest."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def supervised(model: Decoder, tx: optax.GradientTransformation) -> Callable[..., tuple[TrainState, jax.Array]]:
    """The warm start's jitted step: (state, tokens, answer_mask, rate) -> (state, loss); donates the state."""
    return jax.jit(functools.partial(supervised_step, model=model, tx=tx), donate_argnums=0)


def abstract_state(model: Decoder, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a TrainState; computes nothing."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    opt_state = jax.eval_shape(tx.init, lora.split(params, model.c)[0])
    specs = sharding.param_specs(params, dict(mesh.shape))
    tree = TrainState(jax.ShapeDtypeStruct((), jax.numpy.int32), params, opt_state)
    spec_tree = TrainState(PartitionSpec(), specs, sharding.like_params(opt_state, specs))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s)), tree, spec_tree)


def _scorer(c: Config, model: Decoder, params: Any, mesh: Mesh, spoken: NamedSharding) -> Callable[..., jax.Array]:
    split = NamedSharding(mesh, sharding.BATCH)
    read = (split,) if sizes_of(c, model.c) is None else (split, split)

    @functools.partial(jax.jit, in_shardings=(params, *read), out_shardings=spoken)
    def score(params: Params, tokens: jax.Array, *images: Images) -> jax.Array:
        rows = tokens.shape[0]
        n = max(rows // c.batch.micro_batch, 1) if isinstance(c.batch.micro_batch, int) else 1
        n = next(i for i in range(n, rows + 1) if rows % i == 0)  # candidates' rows need not be a multiple
        return update.score(params, tokens, *images, model=model, temperature=c.sample.temperature, parts=n)

    return score
