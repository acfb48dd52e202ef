"""LoRA adapters in PEFT's folder format."""

from __future__ import annotations

from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict

from popo_jax.model_config import ModelConfig
from popo_jax.models.families import FAMILIES
from popo_jax.models.json_files import write_json

THEIRS = {"lora_a": "lora_A", "lora_b": "lora_B"}


def save(folder: epath.PathLike, params: dict[str, Any], c: ModelConfig, *, base: str | None) -> None:
    """adapter_config.json and adapter_model.safetensors, which peft puts on the model `base`."""
    folder, names = epath.Path(folder), FAMILIES[c.family].names
    folder.mkdir(parents=True, exist_ok=True)
    tensors, modules = {}, set()
    for path, x in flatten_dict(params).items():
        if path[-1] not in THEIRS:
            continue
        name = names["/".join((*path[:-1], "kernel"))].removesuffix(".weight")
        modules.add(name.rpartition(".")[2])
        for layer, w in enumerate(np.asarray(x)):
            tensors[f"base_model.model.{name.format(layer)}.{THEIRS[path[-1]]}.weight"] = np.ascontiguousarray(w.T)
    (folder / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": c.lora.rank,
        "lora_alpha": c.lora.alpha,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", config)
