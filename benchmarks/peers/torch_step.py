"""A plain torch train step, case `train`: transformers' Qwen2 (sdpa), GRPO loss, backward, clip, fused AdamW; eager.

Logits are computed for the responses only, as TRL does.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers import case
from benchmarks.peers.worker import WARM, Gate, micro_batch, serve


def loss_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """- mean over response tokens of min(r A, clip(r) A), r = exp(logp - logp_old)."""
    out = model(input_ids=batch["tokens"], use_cache=False, logits_to_keep=case.RESPONSE + 1)
    logits, chosen = out.logits[:, :-1], batch["tokens"][:, case.PROMPT :, None]
    logp = logits.gather(-1, chosen)[..., 0] - logits.logsumexp(-1)
    r, A = torch.exp(logp - batch["logp_old"][:, case.PROMPT :]), batch["adv"][:, None]
    return -torch.minimum(r * A, r.clamp(1 - case.CLIP, 1 + case.CLIP) * A).mean()


def main() -> None:
    gate = Gate(("torch", "transformers"))
    model = AutoModelForCausalLM.from_pretrained(gate.inputs / "policy", dtype=torch.float32).train()
    data = np.load(gate.inputs / "batch.npz")
    batch = {k: torch.from_numpy(data[k]) for k in ("logp_old", "adv")}
    batch["tokens"] = torch.from_numpy(data["tokens"].astype(np.int64))
    rows = micro_batch() or case.TRAIN_ROWS
    micros = [{k: x[i : i + rows] for k, x in batch.items()} for i in range(0, case.TRAIN_ROWS, rows)]
    betas = (case.B1, case.B2)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=case.LEARNING_RATE, betas=betas, eps=case.EPS, weight_decay=0.0, fused=True
    )
    gate.facts |= {"threads": torch.get_num_threads(), "attention": model.config._attn_implementation}
    checked: list[tuple[float, float]] = gate.facts.setdefault("loss_and_norm", [])

    def step() -> int:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros(())
        for micro in micros:
            part = loss_of(model, micro) / len(micros)
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), case.GRAD_CLIP)
        optimizer.step()
        if len(checked) < WARM:
            checked.append((loss.item(), norm.item()))
        return batch["tokens"].numel()

    serve(gate, step)


if __name__ == "__main__":
    main()
