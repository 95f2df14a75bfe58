"""Write a safetensors checkpoint in BF16 with random weights, a layer at a time.

    python scripts/make_checkpoint.py FOLDER [SHAPE]

SHAPE: olmoe (OLMoE-1B-7B, 13.8 GB, the default), qwen3 (Qwen3-30B-A3B, 61 GB), olmoe-4 (four of OLMoE's layers), or
tiny-olmoe and tiny-qwen3.

Every layer has the same random experts, but a router and attention of its own: what they weigh and where they lie is
what counts for measurements. Experts are stored as the library has them, all of a layer in one tensor, so that
accelerate can offload to the checkpoint's own files.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen3MoeConfig

_OLMOE: dict[str, Any] = {
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "intermediate_size": 1024,
    "vocab_size": 50304,
}
_QWEN3: dict[str, Any] = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
}
_TINY: dict[str, Any] = {
    "num_experts": 12,
    "num_experts_per_tok": 2,
    "intermediate_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
SHAPES: dict[str, tuple[type, dict[str, Any]]] = {
    "olmoe": (OlmoeConfig, _OLMOE),
    "qwen3": (Qwen3MoeConfig, _QWEN3),
    "olmoe-4": (OlmoeConfig, {**_OLMOE, "num_hidden_layers": 4}),
    "tiny-olmoe": (OlmoeConfig, _TINY),
    "tiny-qwen3": (Qwen3MoeConfig, {**_TINY, "moe_intermediate_size": 32, "head_dim": 16}),
}


def make_checkpoint(folder: Path, shape: str = "olmoe") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kind, sizes = SHAPES[shape]
    config = kind(**sizes, dtype=torch.bfloat16, eos_token_id=None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    torch.manual_seed(0)
    experts: dict[str, torch.Tensor] = {}  # of all layers
    where: dict[str, str] = {}
    files: dict[str, list[str]] = defaultdict(list)
    parameters = dict(model.named_parameters())
    for name in parameters:
        number = name.removeprefix("model.layers.").split(".")[0]
        files[f"model-{int(number):05d}" if number.isdigit() else "model-ends"].append(name)

    def weight(name: str) -> torch.Tensor:
        size = parameters[name].shape
        if len(size) == 1:
            return torch.ones(size, dtype=torch.bfloat16)
        made = torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02)
        return made * 10 if name.endswith("mlp.gate.weight") else made  # routers that decide

    for file, names in files.items():
        tensors = {}
        for name in names:
            own = name.rpartition(".")[2]
            if ".experts." not in name:
                tensors[name] = weight(name)
                continue
            if own not in experts:
                experts[own] = weight(name)
            tensors[name] = experts[own]
        save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})
        where.update(dict.fromkeys(names, f"{file}.safetensors"))
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[2:] and sys.argv[2] not in SHAPES:
        sys.exit(__doc__)
    make_checkpoint(Path(sys.argv[1]), *sys.argv[2:])
