"""Tunix's GRPOLearner, case `step`: one optimizer step on PROMPTS x GROUP responses, sampled by its own sampler.

Set as ours: float32, no KL, one mini-batch, rollout and actor share one model and mesh.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

from benchmarks.peers import case, tunix_model
from benchmarks.peers.worker import Gate, micro_batch


class Steps:
    """The data set. Asked for the next prompts, the learner is done with a step: the gate stands here."""

    def __init__(self, gate: Gate, model: nnx.Module, texts: list[str]) -> None:
        self.gate, self.model, self.texts, self.sampled = gate, model, texts, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        position = 0
        while True:
            at = [i % len(self.texts) for i in range(position, position + case.PROMPTS)]
            yield {"prompts": np.array([self.texts[i] for i in at])}
            position += case.PROMPTS
            jax.block_until_ready(nnx.state(self.model))
            tokens, self.sampled = self.sampled, 0
            self.gate.step(tokens)

    def reward(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        self.sampled += sum(map(len, completions))
        return [case.reward(text) for text in completions]


def cluster(model: nnx.Module, tokenizer: Any, mesh: jax.sharding.Mesh) -> RLCluster:
    optimizer = optax.chain(
        optax.clip_by_global_norm(case.GRAD_CLIP), optax.adamw(case.LEARNING_RATE, case.B1, case.B2, case.EPS, weight_decay=0.0)
    )
    training = RLTrainingConfig(
        actor_optimizer=optimizer,
        eval_every_n_steps=10**6,
        max_steps=10**6,
        mini_batch_size=case.PROMPTS,
        train_micro_batch_size=(micro_batch() or case.PROMPTS * case.GROUP) // case.GROUP,
        rollout_micro_batch_size=case.PROMPTS,
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=case.RESPONSE,
        max_prompt_length=case.PROMPT,
        kv_cache_size=case.PROMPT + case.RESPONSE,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
    )
    meshes = {Role.ACTOR: mesh, Role.REFERENCE: mesh, Role.ROLLOUT: mesh}
    config = ClusterConfig(role_to_mesh=meshes, training_config=training, rollout_config=rollout)
    return RLCluster(actor=model, tokenizer=tokenizer, cluster_config=config)


def main() -> None:
    gate = Gate(tunix_model.PACKAGES)
    mesh = tunix_model.mesh()
    model = tunix_model.load(gate.inputs, mesh)
    texts, tokenizer = tunix_model.texts_and_tokenizer(gate.inputs)
    rl = cluster(model, tokenizer, mesh)
    steps = Steps(gate, rl.actor_trainer.model, texts)
    config = GRPOConfig(num_generations=case.GROUP, num_iterations=1, beta=0.0, epsilon=case.CLIP, loss_agg_mode="token-mean")
    GRPOLearner(rl, config, steps.reward).train(steps)


if __name__ == "__main__":
    main()
