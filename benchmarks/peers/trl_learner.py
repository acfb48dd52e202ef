"""TRL's GRPOTrainer, case `step`: one optimizer step on PROMPTS x GROUP completions, sampled by `generate`.

Set as ours: float32, no KL, no top-k, token-level loss, AdamW without decay, nothing saved; the rest are its defaults.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers import case
from benchmarks.peers.worker import Gate, micro_batch


class AtEnd(TrainerCallback):
    """Lets the trainer's own loop run a step only when the driver asks."""

    def __init__(self, gate: Gate) -> None:
        self.gate, self.sampled = gate, 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        tokens, self.sampled = self.sampled, 0
        self.gate.step(tokens)


def settings(folder: str) -> GRPOConfig:
    all_rows = case.PROMPTS * case.GROUP
    rows = micro_batch() or all_rows
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=all_rows // rows,
        num_generations=case.GROUP,
        max_completion_length=case.RESPONSE,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        beta=0.0,
        epsilon=case.CLIP,
        loss_type="dapo",
        learning_rate=case.LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=case.B1,
        adam_beta2=case.B2,
        adam_epsilon=case.EPS,
        max_grad_norm=case.GRAD_CLIP,
        optim="adamw_torch_fused",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        max_steps=10**6,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
    )


def main() -> None:
    gate = Gate(("trl", "torch", "transformers", "accelerate"))
    tokenizer = AutoTokenizer.from_pretrained(gate.inputs / "policy")
    model = AutoModelForCausalLM.from_pretrained(gate.inputs / "policy", dtype=torch.float32)
    prompts = case.texts(np.load(gate.inputs / "prompts.npy").tolist())
    at_end = AtEnd(gate)

    def vowels(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        at_end.sampled += sum(map(len, completion_ids))
        return [case.reward(text) for text in completions]

    data = Dataset.from_dict({"prompt": prompts})
    gate.facts |= {"threads": torch.get_num_threads(), "attention": model.config._attn_implementation}
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(model, vowels, settings(folder), data, processing_class=tokenizer, callbacks=[at_end])
        trainer.train()


if __name__ == "__main__":
    main()
