"""Tiny checkpoints of random weights, as the library itself saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from flashmoe.engines.transformers.library import quiet

VOCABULARY = 96
_SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "intermediate_size": 96,
}

#: What each architecture's configuration needs beside _SHAPE.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 40, "num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {"intermediate_size": 32, "num_experts": 12, "num_experts_per_tok": 3},
    "qwen2_moe": {
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "intermediate_size": 96,
        "num_experts": 10,
        "num_experts_per_tok": 3,
    },
    "qwen3_moe": {
        "moe_intermediate_size": 24,
        "intermediate_size": 96,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "head_dim": 16,
    },
    "deepseek_v2": _MLA | {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "deepseek_v3": _MLA | {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "gpt_oss": {
        "intermediate_size": 32,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "glm4_moe": {
        "moe_intermediate_size": 32,
        "intermediate_size": 96,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "head_dim": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "granitemoe": {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 3},
    "ernie4_5_moe": {
        "moe_intermediate_size": 32,
        "intermediate_size": 96,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    # keeps gate and up interleaved in its checkpoints; adds its experts up in another type than it returns
    "inkling2_text": {
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "sliding_window_size": 8,
        "unpadded_vocab_size": VOCABULARY,
        "d_rel": 4,
        "rel_extent": 16,
        "n_layers_per_attn_res_block": 2,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    },
    # adds its experts up in another type than it returns
    "nemotron_h": {
        "moe_intermediate_size": 32,
        "intermediate_size": 96,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "layers_block_type": ["moe", "attention", "moe"],
        "head_dim": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
    },
}


def make_checkpoint(
    name: str, folder: Path, dtype: torch.dtype, shape: dict[str, Any] | None = None, **others: Any
) -> Path:
    """Write a tiny model of an architecture into `folder`, in another `shape`; `others` go to its save_pretrained."""
    kind = transformers.AutoConfig.for_model(name).__class__
    config = kind(**(_SHAPE | ARCHITECTURES[name] | (shape or {})))
    torch.manual_seed(sum(name.encode()))
    with quiet():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:  # large enough for routers to disagree
                    parameter.normal_(0, 0.15)
        model.save_pretrained(folder, **others)
    return folder


def plain(folder: Path) -> Any:
    """The checkpoint as the library loads it, with its eager experts: the reference."""
    with quiet():
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, experts_implementation="eager"
        ).eval()
