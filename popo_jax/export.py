"""`popo export RUN --out DIR`: a folder that transformers opens, with the account of its training as its model card."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from etils import epath

import popo_jax.policy as policies
from popo_jax import restore
from popo_jax.models import peft
from popo_jax.report.account import model_card
from popo_jax.report.read import read
from popo_jax.types import UserError


def export(
    run: epath.PathLike,
    out: epath.PathLike,
    step: int | None,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    adapter: bool = False,
) -> int:
    """Write the policy of a run's newest checkpoint (or `step`'s) to `out`, whole or not at all. Returns the step.

    dtype: of the weights; None: as they were trained. adapter: LoRA's alone, for peft, instead of merged weights.
    """
    out = epath.Path(out)
    if out.exists():
        raise UserError(f"--out {out} must not exist yet")
    restored = restore.restore(run, step)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial"
    if partial.exists():
        partial.rmtree()
    policy = restored.policy
    if dtype is not None:
        policy = replace(policy, model=replace(policy.model, param_dtype=dtype))
    if adapter and policy.model.lora.rank is None:
        raise UserError(f"--adapter wants a run with model.lora.rank, got {run}, which trained every weight")
    if adapter and policy.model.sees:  # PEFT would name its layers otherwise, and find none of ours
        raise UserError(
            f"--adapter is of policies that read text alone: leave it out for merged weights, got family qwen2_5_vl ({run})"
        )
    if adapter:
        peft.save(partial, restored.state.params, policy.model, base=restored.c.policy.path)
        policy.tokenizer.save(partial)
    else:
        policies.save(partial, policy, restored.state.params)
    (partial / "README.md").write_text(_card(run, restored.step, adapter))
    partial.rename(out)
    return restored.step


def _card(run: epath.PathLike, step: int, adapter: bool) -> str:
    try:
        return model_card(read(run), step, adapter=adapter)
    except Exception as e:  # the weights are worth more than their account
        return f"The account of this training could not be made ({type(e).__name__}: {e}). popo report {run} may tell more.\n"
