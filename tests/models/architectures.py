"""The table of tiny models: for each architecture its metadata and its tensors, as data.

A layer is a string of `name:dimensions` items, dimensions in ggml's order (row length first). `name` stands for
`blk.N.name.weight` unless it has a suffix of its own (`attn_q.bias`) or ends in a dot (`ssm_a.`: no suffix).
Letters are the sizes in `SIZES`, overridden per model:

    D embedding   V vocabulary   H heads       K head size      A = heads x head size
    F dense FFN   X expert FFN   J kv heads    E experts        G = kv heads x head size
    S shared FFN  XX = 2X        T experts used per token
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

SIZES = {"D": 64, "F": 128, "X": 96, "S": 96, "E": 8, "T": 2, "H": 4, "J": 2, "K": 16, "one": 1}

ATTN = "attn_norm:D attn_q:D,A attn_k:D,G attn_v:D,G attn_output:A,D "
HEAD_NORMS = "attn_q_norm:K attn_k_norm:K "
FULL_NORMS = "attn_q_norm:A attn_k_norm:G "
QKV_BIAS = "attn_q.bias:A attn_k.bias:G attn_v.bias:G "
MLA = (
    "attn_norm:D attn_q_a:D,Q attn_q_a_norm:Q attn_q_b:Q,HM attn_kv_a_mqa:D,CR attn_kv_a_norm:C "
    "attn_k_b:N,C,H attn_v_b:C,W,H attn_output:HW,D "
)
FFN = "ffn_norm:D ffn_gate:D,F ffn_up:D,F ffn_down:F,D "
ROUTER = "ffn_gate_inp:D,E "
EXPERTS = "ffn_gate_exps:D,X,E ffn_up_exps:D,X,E ffn_down_exps:X,D,E "
FUSED = "ffn_gate_up_exps:D,XX,E ffn_down_exps:X,D,E "
MOE = "ffn_norm:D " + ROUTER + EXPERTS
SHARED = "ffn_gate_shexp:D,S ffn_up_shexp:D,S ffn_down_shexp:S,D "
PROBS_B = "exp_probs_b.bias:E "
TOP = "token_embd:D,V output_norm:D output:D,V"
TIED = "token_embd:D,V output_norm:D"


@dataclass(frozen=True)
class Spec:
    """One tiny model: what it is for, its sizes, metadata, tensors and quantisation."""

    arch: str
    about: str
    layers: tuple[str, ...]
    quants: tuple[str, ...] = ("Q4_0", "Q8_0")
    """Per MoE layer, in turn: one format for all planes, or one each for gate, up and down (fused: gate and down)."""
    sizes: str = ""
    """`letter=number` items over `SIZES`."""
    keys: str = ""
    """`key=value` items over the default metadata, without the architecture's prefix, values in JSON; null removes."""
    top: str = TOP
    rest: str = "Q8_0"
    """Format of the matrices that are not experts."""
    chat: bool = False
    alignment: int = 32
    router_scale: float = 2.0

    def dims(self) -> dict[str, int]:
        """The sizes, with those that follow from others."""
        d = {**SIZES, "V": len(vocabulary()[0]), **_parse(self.sizes)}
        return {"A": d["H"] * d["K"], "G": d["J"] * d["K"], "XX": 2 * d["X"], **d}

    def metadata(self) -> dict[str, Any]:
        """The architecture's metadata keys, without its prefix."""
        d = self.dims()
        keys = {
            "block_count": len(self.layers),
            "context_length": 512,
            "embedding_length": d["D"],
            "feed_forward_length": d["F"],
            "attention.head_count": d["H"],
            "attention.head_count_kv": d["J"],
            "attention.key_length": d["K"],
            "attention.value_length": d["K"],
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 10000.0,
            "expert_count": d["E"],
            "expert_used_count": d["T"],
            "expert_feed_forward_length": d["X"],
        }
        return {k: v for k, v in {**keys, **_parse(self.keys)}.items() if v is not None}

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Every tensor's name, shape in ggml's order and wished format, in the order of the file."""
        dims = self.dims()
        yield from _expand(self.top, "", dims, (self.rest,))
        moe = 0
        for number, layer in enumerate(self.layers):
            formats = (self.quants[moe % len(self.quants)] if "_exps:" in layer else self.rest).split()
            moe += "_exps:" in layer
            yield from _expand(layer, f"blk.{number}.", dims, (self.rest, *formats))


def _parse(items: str) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in (item.split("=") for item in items.split())}


def _expand(items: str, prefix: str, dims: dict[str, int], formats: tuple[str, ...]) -> Iterator[tuple]:
    rest, *planes = formats
    for item in items.split():
        name, letters = item.split(":")
        shape = tuple(int(x) if x.isdigit() else dims[x] for x in letters.split(","))
        kind = rest
        if name.endswith("exps") and len(shape) == 3:
            order = ("gate", "up", "down") if len(planes) == 3 else ("gate", "down")
            kind = planes[0] if len(planes) == 1 else planes[order.index(name.split("_")[1])]
        full = name[:-1] if name.endswith(".") else name if "." in name else name + ".weight"
        yield prefix + full, shape, kind


BYTE_VOCAB = 256
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = (
    "Ġthe",
    "Ġand",
    "Ġof",
    "Ġto",
    "Ġin",
    "Ġis",
    "ing",
    "er",
    "on",
    "Ġhello",
    "Ġworld",
    "user",
    "assistant",
    "Ġsky",
)


@lru_cache
def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE: the bytes, the special tokens, and the pieces of a few words."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(unprintable)}
    tokens = [letters[b] for b in range(256)] + list(SPECIAL_TOKENS)
    merges = []
    for word in WORDS:
        for end in range(1, len(word)):
            if word[: end + 1] not in tokens:
                merges.append(f"{word[:end]} {word[end]}")
                tokens.append(word[: end + 1])
    return tokens, merges


DENSE = Spec(
    "llama",
    "no experts at all",
    (ATTN + FFN,) * 2,
    keys="expert_count=null expert_used_count=null expert_feed_forward_length=null",
)

ARCHITECTURES: dict[str, Spec] = {
    "llama": Spec(
        "llama",
        "Mixtral: 8 experts, top 2, one format per plane",
        (ATTN + MOE,) * 3,
        quants=("Q4_0 Q4_0 Q8_0", "Q5_0 Q8_0 F16", "F32"),
        keys="feed_forward_length=96",
        chat=True,
    ),
    "olmoe": Spec(
        "olmoe",
        "16 experts, top 4, softmax without renormalisation, no chat template",
        (ATTN + FULL_NORMS + MOE,) * 4,
        quants=("Q4_0", "Q8_0", "Q5_0", "Q4_0 Q4_0 Q5_1"),
        sizes="E=16 T=4 J=4",
        keys="feed_forward_length=96",
    ),
    "qwen2moe": Spec(
        "qwen2moe",
        "shared expert with a gate of its own, biases on q, k and v",
        (ATTN + QKV_BIAS + MOE + SHARED + "ffn_gate_inp_shexp:D",) * 3,
        quants=("Q5_0", "Q4_0 Q8_0 Q5_0", "F16"),
        sizes="E=12 T=4 S=160",
        keys="expert_shared_feed_forward_length=160",
        chat=True,
    ),
    "deepseek2": Spec(
        "deepseek2",
        "MLA, leading dense layer, shared expert, sigmoid gating with a selection bias, 2 of 4 groups of experts",
        (MLA + FFN, *(MLA + MOE + SHARED + PROBS_B,) * 3),
        quants=("Q4_0", "Q8_0", "Q4_0 Q5_0 Q8_0"),
        sizes="E=16 T=4 J=1 S=192 Q=32 C=32 R=16 N=32 W=32 CR=48 HM=192 HW=128",
        keys=(
            "attention.q_lora_rank=32 attention.kv_lora_rank=32 attention.key_length=48 "
            "attention.value_length=32 attention.key_length_mla=48 attention.value_length_mla=32 "
            "rope.dimension_count=16 leading_dense_block_count=1 expert_shared_count=2 "
            "expert_weights_scale=2.5 expert_weights_norm=true expert_gating_func=2 expert_group_count=4 "
            "expert_group_used_count=2"
        ),
    ),
    "gpt-oss": Spec(
        "gpt-oss",
        "MXFP4 experts with biases on gate, up and down, router bias, attention sinks, sliding window of 8",
        (
            ATTN + QKV_BIAS + "attn_output.bias:D attn_sinks:H post_attention_norm:D ffn_gate_inp.bias:E "
            "ffn_gate_exps.bias:X,E ffn_up_exps.bias:X,E ffn_down_exps.bias:D,E " + ROUTER + EXPERTS,
        )
        * 4,
        quants=("MXFP4", "MXFP4", "MXFP4 MXFP4 Q8_0"),
        sizes="T=4 E=12",
        keys="attention.sliding_window=8",
        chat=True,
    ),
    "cohere2moe": Spec(
        "cohere2moe",
        "fused gate_up, parallel attention and FFN, leading dense layer, shared expert, sliding window",
        (
            ATTN + "ffn_gate:D,F ffn_up:D,F ffn_down:F,D",
            *(ATTN + ROUTER + FUSED + SHARED,) * 3,
        ),
        quants=("Q4_0", "Q8_0", "Q5_0 Q4_0"),
        sizes="T=3",
        keys=(
            "attention.sliding_window=8 attention.sliding_window_pattern=2 logit_scale=1.0 "
            "attention.layer_norm_epsilon=1e-05 leading_dense_block_count=1 expert_shared_count=1 "
            "expert_shared_feed_forward_length=96 expert_weights_norm=true"
        ),
    ),
}
