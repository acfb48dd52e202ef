"""The jitted train step, and the forward pass with log-probs that it begins with."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from benchmarks.suite.measure import Timed, beside_peak, compiled
from benchmarks.suite.report import Line, line
from benchmarks.suite.sizes import Size, built
from popo_jax.build import Built
from popo_jax.costs import arithmetic
from popo_jax.data.arrange import arrange
from popo_jax.rl.state import Batch, batch_specs
from popo_jax.runtime.mesh import place


def run(size: Size) -> Iterator[Line]:
    """A train step on full rows, half of them replayed; the forward pass alone."""
    b = built(size.train, jax.device_count())
    c, shape = b.c, b.model.c
    batch = place(random_batch(b), b.mesh, batch_specs())
    state = b.state(b.fresh_params(jax.random.key(0)))
    step, score = compiled(b.train_step, state, batch), compiled(b.score, state.params, batch.tokens)
    holder = [state]
    del state

    def train() -> object:
        holder[0], out = step.call(holder[0], batch)
        return out

    parts = {"step": Timed(train), "forward": Timed(lambda: score.call(holder[0].params, batch.tokens))}
    got = beside_peak(parts, size)
    metrics = jax.device_get(step.call(holder[0], batch)[1].metrics)
    if metrics["update/nonfinite"] or metrics["update/skipped"]:
        raise RuntimeError("the train step that was timed did not update the parameters")
    shapes = {"rows": c.rows, "tokens": c.row_tokens}
    work = arithmetic.train(shape, **shapes, mini_batches=c.batch.mini_batches), arithmetic.forward(shape, **shapes)
    parameters = sum(x.size for x in jax.tree.leaves(b.abstract_state.params))
    both = zip(("step", "forward"), (step, score), work, strict=True)
    for name, program, model_flops in both:
        yield line(
            "train_step" if name == "step" else "train_step/forward",
            size.name,
            got.seconds[name],
            program=program,
            flops=model_flops,
            tokens=c.rows * c.row_tokens,
            peak=got.peak,
            others=got.others,
            rows=c.rows,
            row_tokens=c.row_tokens,
            mini_batches=c.batch.mini_batches,
            parameters=parameters,
        )


def random_batch(b: Built) -> Batch:
    return Batch(**arrange(random_rows(b), b.split)[0])  # type: ignore[arg-type]


def random_rows(b: Built) -> dict[str, np.ndarray]:
    """Full rows: a prompt, then counted tokens; every other group replayed, with behaviour log-probs near uniform."""
    c, vocab = b.c, b.model.c.vocab_size
    assert vocab is not None
    rng, shape = np.random.default_rng(0), (c.rows, c.row_tokens)
    mask = np.broadcast_to(np.arange(c.row_tokens) >= c.sample.max_prompt_tokens, shape)
    logp = np.where(mask, -np.log(vocab), 0).astype(np.float32)
    fresh = np.arange(c.rows) // c.batch.group_size % 2 == 0
    return {
        "tokens": rng.integers(0, vocab, shape).astype(np.int32),
        "sampled_mask": mask.copy(),
        "token_mask": mask.copy(),
        "logp_behav": logp,
        "logp_sampler": logp,
        "adv": rng.normal(size=c.rows).astype(np.float32),
        "fresh": fresh,
        "version": np.where(fresh, 0, -1).astype(np.int32),
    }
