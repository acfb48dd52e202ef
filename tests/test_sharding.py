from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from popo_jax.model_config import ModelConfig
from popo_jax.models.decoder import Decoder
from popo_jax.sharding import BATCH, like_params, param_specs

C = ModelConfig(
    vocab_size=30,
    layers=2,
    width=24,
    heads=6,
    kv_heads=3,
    head_dim=8,
    mlp=40,
    tie_embeddings=False,
    linear="plain",
    attention="xla",
)


def abstract(**changes):
    return jax.eval_shape(Decoder(dataclasses.replace(C, **changes)).init, jax.random.key(0))


def test_every_weight_is_split_as_its_logical_axes_say():
    specs = param_specs(abstract())
    assert specs == {
        "embed": {"embedding": P("tensor", "fsdp")},
        "layers": {
            "attn_norm": {"scale": P(None, None)},
            "attn": {
                "q": {"kernel": P(None, "fsdp", "tensor"), "bias": P(None, "tensor")},
                "k": {"kernel": P(None, "fsdp", "tensor"), "bias": P(None, "tensor")},
                "v": {"kernel": P(None, "fsdp", "tensor"), "bias": P(None, "tensor")},
                "o": {"kernel": P(None, "tensor", "fsdp")},
            },
            "mlp_norm": {"scale": P(None, None)},
            "mlp": {
                "gate": {"kernel": P(None, "fsdp", "tensor")},
                "up": {"kernel": P(None, "fsdp", "tensor")},
                "down": {"kernel": P(None, "tensor", "fsdp")},
            },
        },
        "norm": {"scale": P(None)},
        "head": {"kernel": P("fsdp", "tensor")},
    }
    assert P(("data", "fsdp")) == BATCH


def test_an_axis_that_does_not_divide_stays_whole():
    specs = param_specs(abstract(), {"data": 2, "fsdp": 5, "tensor": 4})
    assert specs["embed"]["embedding"] == P(None, None)  # 30 / 4, 24 / 5
    assert specs["layers"]["mlp"]["down"]["kernel"] == P(None, "tensor", None)  # 40 / 4, 24 / 5


def test_rules_may_name_several_mesh_axes():
    rules = {"vocab": ("fsdp", "tensor"), "embed": None}
    tree = {"embed": {"embedding": jnp.zeros((30, 24))}}
    assert param_specs(tree, {"fsdp": 3, "tensor": 5}, rules)["embed"]["embedding"] == P(("fsdp", "tensor"), None)
    assert param_specs(tree, {"fsdp": 3, "tensor": 4}, rules)["embed"]["embedding"] == P(None, None)


def test_an_undeclared_weight_is_refused():
    with pytest.raises(ValueError, match="layers/attn/q/lora"):
        param_specs({"layers": {"attn": {"q": {"lora": jnp.zeros((2, 3))}}}})
    with pytest.raises(ValueError, match="norm/scale"):
        param_specs({"norm": {"scale": jnp.zeros((2, 3))}})


class Moments(NamedTuple):
    count: jax.Array
    mu: dict
    factored: dict


def test_optimizer_state_follows_its_parameters():
    params = abstract()
    specs = param_specs(params)
    state = jax.eval_shape(optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam()).init, params)
    got = like_params(state, specs)
    assert got[1].mu == got[1].nu == specs
    assert got[1].count == P()


def test_a_leaf_with_other_axes_is_replicated():
    specs = param_specs(abstract())
    tree = Moments(jnp.zeros(()), {"norm": {"scale": jnp.zeros(24)}}, {"head": {"kernel": jnp.zeros(24)}})
    assert like_params(tree, specs) == Moments(P(), {"norm": {"scale": P(None)}}, {"head": {"kernel": P()}})


PROGRAM = """
import dataclasses, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding
from popo_jax.model_config import ModelConfig
from popo_jax.models.decoder import Decoder
from popo_jax.sampling import sampler as sampling
from popo_jax.sampling.sampler import Decoding, Sampler
from popo_jax.sharding import BATCH, param_specs
assert jax.device_count() == 8
def close(a, b):  # an element is a sum of terms as large as the largest: rounding is of their size
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max(), rtol=0)
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
shape = {"vocab_size": 32, "layers": 2, "width": 24, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 40}
model = Decoder(ModelConfig(**shape, linear="barrier", attention="xla"))
params = jax.jit(model.init)(jax.random.key(0))
params = jax.tree.map(lambda x: x * 5, params)
tokens = jax.random.randint(jax.random.key(1), (8, 9), 0, 32)
step = jax.jit(jax.value_and_grad(lambda p, t: jnp.square(model.logits(p, t)).mean()))
alone = step(params, tokens)
place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
split = jax.tree.map(place, params, param_specs(params, dict(mesh.shape)))
assert split["layers"]["attn"]["q"]["kernel"].addressable_shards[0].data.shape == (2, 12, 16)
together = step(split, place(tokens, BATCH))
jax.tree.map(close, alone, together)
weights = jax.jit(model.for_decode)(split)
chunked = Decoder(dataclasses.replace(model.c, head_chunk=3), row_shards=4)
for policy in (model, chunked):
    score = jax.jit(jax.value_and_grad(lambda p, t: sum(x.mean() for x in policy.logprobs(p, t, temperature=0.7))))
    alone, together = score(params, tokens), score(split, place(tokens, BATCH))
    jax.tree.map(close, alone, together)
start = jnp.zeros(8, jnp.int32)
logits, cache = jax.jit(model.prefill, static_argnums=3)(weights, place(tokens[:, :8], BATCH), start, 10)
logits, cache = jax.jit(model.decode)(weights, cache, tokens[:, 8], jnp.int32(8), start)
close(model.logits(params, tokens)[:, -1], logits)

sampling.SMALLEST_BUCKET = 1
prompts = [np.arange(3, 3 + n, dtype=np.int32) for n in (2, 5, 3, 6, 4, 4, 5)]
single = jax.make_mesh((1, 1, 1), mesh.axis_names, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])
kept = []
take = sampling._take
sampling._take = lambda rows, at, *, mesh: kept.append((len(at), mesh.size)) or take(rows, at, mesh=mesh)
local = jax.device_put(params, jax.devices()[0])
for n, samples, max_rows in ((6, 8, None), (2, 6, None), (7, 4, 12), (1, 3, None)):
    c = Decoding(samples, 1.0, None, 1.0, 8, 12, 2, max_rows, (5, 9, 11))
    alone = Sampler(model, c, single)(local, prompts[:n], jax.random.key(3), version=0)
    together = Sampler(model, c, mesh)(split, prompts[:n], jax.random.key(3), version=0)
    np.testing.assert_array_equal(alone.tokens, together.tokens)
    np.testing.assert_array_equal(alone.sampled_mask, together.sampled_mask)
    close(alone.logp, together.logp)
    assert len(set(alone.sampled_mask.sum(axis=1))) > (3 if n > 2 else 1)
assert any(devices == 8 for _, devices in kept), "no row was dropped on the mesh: compaction was not tried"
"""


def test_eight_devices_compute_what_one_does():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


STEP = """
import sys, json, jax
from jax.sharding import AxisType
from popo_jax.build import build
from popo_jax.config import from_dict
from popo_jax.costs.count import count
from popo_jax.costs.hlo import parse
from popo_jax.rl.state import abstract_batch
from popo_jax.rules import resolve
mesh = jax.make_mesh(tuple(map(int, sys.argv[1:])), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
model = {"vocab_size": 4096, "layers": 4, "width": 512, "heads": 4, "kv_heads": 2, "head_dim": 128, "mlp": 1024}
batch = {"prompts": 8, "group_size": 4, "micro_batch": 8, "length_buckets": 1}
c = {"model": model | {"head_chunk": 128, "remat": "full"}, "batch": batch}
c = resolve(from_dict(c | {"sample": {"max_prompt_tokens": 64, "max_response_tokens": 192}}))
b = build(c, c.model, eos_ids=(1,), mesh=mesh)
text = b.train_step.lower(b.abstract_state, abstract_batch(b.split, b.model.c)).compile().as_text()
counted = count(parse(text), trips=lambda _: float(b.split.micro_batches), kernel=lambda *_: None)
print(json.dumps({"moved": [(x.kind, x.bytes, x.source) for x in counted.collectives], "host": counted.host}))
"""


@pytest.mark.parametrize("mesh", [(1, 4, 1), (1, 2, 2)])
def test_only_weights_and_their_gradients_travel(mesh):
    """Nothing that is exchanged is as large as a chunk of a micro-batch's logits, or as much of the model as two blocks; and
    nothing goes to the host within the step."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(STEP), *map(str, mesh)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    got = json.loads(done.stdout)
    block, logits = 4 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1024), 4 * 8 * 128 * 4096
    largest = max(got["moved"], key=lambda x: x[1])
    assert largest[1] <= 1.1 * block < logits, largest
    assert got["host"] == [] and any(kind == "all-gather" for kind, *_ in got["moved"])
