"""Writing the model: a GGUF file for llama.cpp, and safetensors with the names of Hugging Face's OLMoE."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from model import Model, Shape
from safetensors.torch import save_file
from tokenizer import END, SPECIALS, Tokenizer
from torch import Tensor

# llama.cpp recognises built-in formats by the strings in the template: "<|user|>" with "<|endoftext|>" is the one that
# is meant here, unless "<|assistant|>" is also found whole, so that one is put together.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '<|endoftext|>\\n' }}"
    "{% else %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|endoftext|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|' + 'assistant' + '|>\\n' }}{% endif %}"
)

DESCRIPTION = (
    "A very small mixture-of-experts language model that comes with FlashMoE, for trying the program out. "
    "It writes English and Python that read well for a line or two, and is often wrong."
)

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q5_1": gguf.GGMLQuantizationType.Q5_1,
    "q5_0": gguf.GGMLQuantizationType.Q5_0,
    "q4_1": gguf.GGMLQuantizationType.Q4_1,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}


def tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """GGUF names and weights, in the file's order."""
    yield "token_embd.weight", model.embedding
    for layer in range(model.shape.layers):
        block = f"blk.{layer}."
        attention, experts = model.attentions[layer], model.experts[layer]
        yield block + "attn_norm.weight", model.attention_norms[layer].weight
        yield block + "attn_q.weight", attention.q
        yield block + "attn_k.weight", attention.k
        yield block + "attn_v.weight", attention.v
        yield block + "attn_output.weight", attention.o
        yield block + "attn_q_norm.weight", attention.q_norm.weight
        yield block + "attn_k_norm.weight", attention.k_norm.weight
        yield block + "ffn_norm.weight", model.expert_norms[layer].weight
        yield block + "ffn_gate_inp.weight", experts.router
        yield block + "ffn_gate_exps.weight", experts.gate
        yield block + "ffn_down_exps.weight", experts.down
        yield block + "ffn_up_exps.weight", experts.up
    yield "output_norm.weight", model.final_norm.weight
    yield "output.weight", model.output


def kind_of(name: str, values: Tensor, experts: str, dense: str) -> str:
    """The storage type of one tensor: norms and routers stay f32."""
    if values.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
        return "f32"
    return experts if "_exps" in name else dense


def write_gguf(
    model: Model, tokenizer: Tokenizer, path: Path, experts: str = "q5_0", dense: str = "q8_0"
) -> int:
    """Write the GGUF file; return its size."""
    writer = gguf.GGUFWriter(path, "olmoe")
    _metadata(writer, model)
    _vocabulary(writer, tokenizer)
    for name, values in tensors(model):
        data = values.detach().float().numpy()
        kind = TYPES[kind_of(name, values, experts, dense)]
        if kind == TYPES["f32"]:
            writer.add_tensor(name, np.ascontiguousarray(data))
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.stat().st_size


def quantised(model: Model, experts: str, dense: str) -> Model:
    """A copy whose weights went through the file's types and back, for measuring what they cost."""
    copy = Model(model.shape)
    copy.load_state_dict(model.state_dict())
    copy.kind = model.kind
    with torch.no_grad():
        for name, values in tensors(copy):
            kind = TYPES[kind_of(name, values, experts, dense)]
            packed = gguf.quants.quantize(values.numpy(), kind)
            values.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind).reshape(values.shape).copy()))
    return copy.eval()


def _metadata(writer: gguf.GGUFWriter, model: Model) -> None:
    shape = model.shape
    writer.add_name("FlashMoE demo")
    writer.add_description(DESCRIPTION)
    writer.add_author("The FlashMoE developers")
    writer.add_license("Apache-2.0")
    writer.add_size_label("29M-A6M")
    writer.add_languages(["en"])
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.expert_width)
    writer.add_expert_feed_forward_length(shape.expert_width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.picked)
    writer.add_vocab_size(shape.vocabulary)


def _vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    pieces = tokenizer.stream()
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([control if piece in SPECIALS else normal for piece in pieces])
    writer.add_token_merges(tokenizer.merges())
    end = tokenizer.special(END)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def write_hf(model: Model, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `model.safetensors`, `config.json` and the tokenizer as Hugging Face's OLMoE classes expect them."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"model.embed_tokens.weight": model.embedding, "lm_head.weight": model.output}
    weights["model.norm.weight"] = model.final_norm.weight
    for layer in range(model.shape.layers):
        block = f"model.layers.{layer}."
        attention, experts = model.attentions[layer], model.experts[layer]
        weights[block + "input_layernorm.weight"] = model.attention_norms[layer].weight
        weights[block + "post_attention_layernorm.weight"] = model.expert_norms[layer].weight
        for letter in "qkvo":
            weights[f"{block}self_attn.{letter}_proj.weight"] = getattr(attention, letter)
        weights[block + "self_attn.q_norm.weight"] = attention.q_norm.weight
        weights[block + "self_attn.k_norm.weight"] = attention.k_norm.weight
        weights[block + "mlp.gate.weight"] = experts.router
        for expert in range(model.shape.experts):
            for kind in ("gate", "up", "down"):
                weights[f"{block}mlp.experts.{expert}.{kind}_proj.weight"] = getattr(experts, kind)[expert]
    plain = {name: values.detach().float().clone().contiguous() for name, values in weights.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_hf_config(model, tokenizer), indent=2) + "\n")
    tokenizer.save(folder / "tokenizer.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": model.shape.context,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _hf_config(model: Model, tokenizer: Tokenizer) -> dict:
    shape, end = model.shape, tokenizer.special(END)
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.expert_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.epsilon,
        "rope_theta": shape.rope_base,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.picked,
        "norm_topk_prob": False,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "clip_qkv": None,
        "torch_dtype": "float32",
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
    }


def load(checkpoint: Path) -> Model:
    """The model of a training checkpoint."""
    content = torch.load(checkpoint)
    model = Model(Shape(**content["shape"]))
    model.load_state_dict(content["model"])
    return model.eval()
