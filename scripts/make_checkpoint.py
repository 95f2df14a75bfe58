"""Write a safetensors checkpoint of OLMoE-1B-7B's shape in BF16 with random weights (13.8 GB), a layer at a time.

    python scripts/make_checkpoint.py FOLDER

Every layer has the same random experts, but a router and attention of its own: what they weigh and where they lie is
what counts for measurements. Experts are stored as the library has them, all of a layer in one tensor, so that
accelerate can offload to the checkpoint's own files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import OlmoeConfig


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = OlmoeConfig(
        num_experts=64,
        num_experts_per_tok=8,
        intermediate_size=1024,
        vocab_size=50304,
        dtype=torch.bfloat16,
        architectures=["OlmoeForCausalLM"],
        eos_token_id=None,
    )
    config.save_pretrained(folder)
    n, inner, count = config.hidden_size, config.intermediate_size, config.num_experts
    torch.manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)

    experts = {"gate_up_proj": weight(count, 2 * inner, n), "down_proj": weight(count, n, inner)}
    where: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))

    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}mlp.experts.{name}": tensor for name, tensor in experts.items()}
        tensors[f"{prefix}mlp.gate.weight"] = weight(count, n) * 10  # routers that decide
        for projection in "qkvo":
            tensors[f"{prefix}self_attn.{projection}_proj.weight"] = weight(n, n)
        for norm in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(n, dtype=torch.bfloat16)
        write(f"model-{layer:05d}.safetensors", tensors)
    ends = {"model.embed_tokens.weight": weight(config.vocab_size, n)}
    ends |= {"lm_head.weight": weight(config.vocab_size, n), "model.norm.weight": torch.ones(n).bfloat16()}
    write("model-ends.safetensors", ends)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
