"""Tiny models of the architectures that the library knows: metadata here, tensors as the library itself asks for them.

    families(["qwen4exp", "afmoe@64"], folder)     # {"qwen4exp": folder / "qwen4exp.gguf", ...}

A name with `@64` is the same model with 64 small experts in one format, so that slots are left for prefetching.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from .spec import SIZES, U64, vocabulary

D, H, J, K, F, X, E, T = 64, 4, 2, 16, 128, 96, 16, 4
WIDE = "@64"

Shape = tuple[int, ...]
#: Names and shapes of the tensors that a library wants for an architecture, its metadata and its tokenizer's.
Wanted = Callable[[str, dict[str, Any], dict[str, Any]], list[tuple[str, Shape]]]

# What is multiplied with, and so can be quantised
_MATRIX = re.compile(
    r"(attn_(q|k|v|qkv|output|q_a|q_b|kv_a_mqa|kv_b|gate|kv)|ffn_(gate|up|down)(_shexp)?|ffn_latent_(up|down)|"
    r"ffn_routed_(up|down)|token_embd|output|nextn\.eh_proj|ssm_(in|out|ba)|per_layer_model_proj|inp_gate|proj)"
    r"\.weight$|_(ch)?exps\.weight$"
)
_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate_up|gate|up|down)_exps\.weight")
_BLOCK = re.compile(r"blk\.(\d+)\.(.*)")
_SCALE = re.compile(r"\.(input_)?scale$")
QKV_BIAS = r"attn_(q|k|v|output|qkv)\.bias$"


@dataclass(frozen=True)
class Family:
    """A model of an architecture, and which of the tensors that it may have it has."""

    arch: str
    keys: dict[str, Any]
    drop: str = ""  # pattern of optional tensors that it lacks; scales it has only where `keep` says so
    keep: str = ""
    quants: tuple[str, ...] = ("Q4_0", "Q8_0", "Q5_0")  # of the blocks with experts, in turn
    unfused: bool = False  # gate and up of their own, where the library would take them as one tensor
    dense_first: bool = (
        False  # blocks before leading_dense_block_count are dense: their experts are optional tensors
    )
    nextn: bool = (
        False  # the library asks the file for the last block's prediction before it wants its tensors
    )
    skipped: bool = False  # a dense block of prediction more, which the library never looks at
    tokenizer: dict[str, Any] = field(default_factory=dict)
    wanted: Wanted | None = None

    alignment = 32
    chat = False
    router_scale = 2.0

    def dims(self) -> dict[str, int]:
        return {**SIZES, "E": self.keys["expert_count"]}

    def metadata(self) -> dict[str, Any]:
        """The architecture's metadata keys, without its prefix."""
        if not self.skipped:
            return self.keys
        return {**self.keys, "block_count": self.keys["block_count"] + 1, "nextn_predict_layers": 1}

    def wide(self) -> Family:
        """The same with 64 experts of 32 rows in one format."""

        def narrow(value: Any) -> Any:
            return [narrow(v) for v in value] if isinstance(value, list) else 32 if value == X else value

        widths = ("expert_feed_forward_length", "feed_forward_length")
        keys = self.keys | {key: narrow(self.keys[key]) for key in widths if key in self.keys}
        return replace(self, keys=keys | {"expert_count": 64}, quants=("Q4_0",))

    def tensors(self) -> Iterator[tuple[str, Shape, str]]:
        """Every tensor's name, shape in ggml's order and format, in the order of the file."""
        assert self.wanted
        found = dict(self.wanted(self.arch, self.keys, self.tokenizer))
        last = self.keys["block_count"]
        found = {name: shape for name, shape in found.items() if self._has(name)}
        if self.unfused:
            found = dict(unfuse(found))
        if self.nextn:
            found |= prediction(last - 1)
        if self.skipped:
            first = {name: shape for name, shape in found.items() if name.startswith("blk.0.")}
            found |= {name.replace("blk.0.", f"blk.{last}."): shape for name, shape in first.items()}
            found |= prediction(last)
        blocks = sorted({int(m[1]) for name in found if (m := _EXPERTS.match(name))})
        for name, shape in found.items():
            yield name, shape, self._kind(name, blocks)

    def _has(self, name: str) -> bool:
        if _SCALE.search(name) and not (self.keep and re.search(self.keep, name)):
            return False
        if self.drop and re.search(self.drop, name):
            return False
        block = _BLOCK.match(name)
        if not self.dense_first or not block:
            return True
        dense = re.fullmatch(r"ffn_(gate|up|down)\.weight", block[2])
        moe = re.match(r"ffn_(gate_inp|.*exps|.*shexp)|exp_probs_b", block[2])
        return not (moe if int(block[1]) < self.keys.get("leading_dense_block_count", 1) else dense)

    def _kind(self, name: str, blocks: list[int]) -> str:
        if experts := _EXPERTS.match(name):
            kinds = self.quants[blocks.index(int(experts[1])) % len(self.quants)].split()
            return kinds[-1] if experts[2] == "down" else kinds[0]
        return "Q8_0" if _MATRIX.search(name) else "F32"


def unfuse(tensors: dict[str, Shape]) -> Iterator[tuple[str, Shape]]:
    """Gate and up as tensors of their own."""
    for name, shape in tensors.items():
        if "ffn_gate_up_exps.weight" in name:
            for one in ("gate", "up"):
                yield name.replace("gate_up", one), (shape[0], shape[1] // 2, shape[2])
        else:
            yield name, shape


def prediction(block: int) -> dict[str, Shape]:
    """What every block of prediction has."""
    shapes = {"eh_proj": (2 * D, D), "enorm": (D,), "hnorm": (D,), "shared_head_norm": (D,)}
    return {f"blk.{block}.nextn.{name}.weight": shape for name, shape in shapes.items()}


def base(n: int = 5, **more: Any) -> dict[str, Any]:
    """What most architectures want, of `n` blocks. `more`: "__" stands for "."; None takes a key away."""
    keys = {
        "block_count": n, "context_length": 512, "embedding_length": D, "feed_forward_length": F,
        "attention.head_count": H, "attention.head_count_kv": J, "attention.key_length": K,
        "attention.value_length": K, "attention.layer_norm_rms_epsilon": 1e-5, "attention.layer_norm_epsilon": 1e-5,
        "rope.freq_base": 10000.0, "expert_count": E, "expert_used_count": T, "expert_feed_forward_length": X,
    }  # fmt: skip
    return {k: v for k, v in (keys | dotted(more)).items() if v is not None}


def dotted(keys: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in keys.items()}


def window(n: int, pattern: Any) -> dict[str, Any]:
    return {"attention.sliding_window": n, "attention.sliding_window_pattern": pattern}


MLA = {
    "attention.q_lora_rank": 32, "attention.kv_lora_rank": 32, "attention.key_length": 48,
    "attention.value_length": 32, "attention.key_length_mla": 48, "attention.value_length_mla": 32,
    "rope.dimension_count": 16, "attention.head_count_kv": 1,
}  # fmt: skip
SHARED = {
    "leading_dense_block_count": 1, "expert_shared_count": 1, "expert_weights_norm": True,
    "expert_weights_scale": 1.5, "expert_gating_func": 2,
}  # fmt: skip
GROUPED = {"expert_group_count": 4, "expert_group_used_count": 2}
INDEXER = dotted(
    {
        "attention__indexer__head_count": 4,
        "attention__indexer__key_length": 64,
        "attention__indexer__top_k": 16,
    }
)
DELTA = {
    "ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 32, "ssm.time_step_rank": 4, "ssm.group_count": 2,
    "full_attention_interval": 2, "rope.dimension_sections": [2, 2, 2, 2], "expert_shared_feed_forward_length": 96,
}  # fmt: skip
MAMBA2 = {
    "ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 16, "ssm.time_step_rank": 8, "ssm.group_count": 1,
}  # fmt: skip
KDA = {"ssm.conv_kernel": 4, "kda.head_dim": 16, "kda.gate_lower_bound": -5.0, "kda.safe_gate": True}
MTP = {"nextn_predict_layers": 1}
HYPER = {"hyper_connection.count": 4, "hyper_connection.epsilon": 1e-6}
SINKHORN = HYPER | {"hyper_connection.sinkhorn_iterations": 2}
GRANITE = {
    "expert_shared_feed_forward_length": 96, "logit_scale": 2.0, "residual_scale": 0.5, "embedding_scale": 1.5,
    "attention.scale": 0.25, "feed_forward_length": X,
}  # fmt: skip
# latent attention in every other block, linear in the others
HYBRID = MLA | {"attention.head_count_kv": [0, 1, 0, 1, 0]}
HYBRID_MTP = MLA | {"attention.head_count_kv": [0, 1, 0, 1, 0, 1]}
NO_ROPE = {"attention.key_length": 32, "rope.dimension_count": 0}
KIMI = {"attn_res.block_size": 2, "activation.situ_beta": 4.0, "activation.situ_linear_beta": 25.0}
ROWS = 300  # that a hash of the last tokens can fall on
QWEN4 = SINKHORN | DELTA | {
    "hyper_connection.low_rank": 8, "attention.compress_ratios": [4] * 4, "ple.layers": [0], "ple.ngram_size": 3,
    "ple.heads_per_ngram": 2, "ple.conv_kernel": 4, "ple.eos_token_id": 256,
    "embedding_length_per_layer_input": D // 4, "ple.layer_multipliers": [U64(1), U64(3), U64(5)],
    "ple.head_offsets": [U64(head * ROWS) for head in range(4)], "ple.head_vocab_sizes": [U64(ROWS)] * 4,
    "attention.indexer.head_count": 4, "attention.indexer.key_length": K, "attention.indexer.top_k": 16,
}  # fmt: skip
GEMMA = window(16, [True, True, False] * 2) | {
    "attention.key_length_swa": 16, "attention.value_length_swa": 16, "rope.freq_base_swa": 10000.0,
    "rope.dimension_count_swa": 16, "embedding_length_per_layer_input": 32, "final_logit_softcapping": 30.0,
}  # fmt: skip
GEMMA_SCALES = r"ffn_gate_inp\.scale|ffn_down_exps\.scale"
NEMOTRON = MAMBA2 | MTP | {
    "attention.head_count_kv": [0, 0, 2, 0, 0, 2], "feed_forward_length": [0, X, 0, 160, 0, X],
    "expert_used_count": [0, 2, 0, 4, 0, 2], "expert_feed_forward_length": [0, X, 0, 160, 0, X],
    "moe_latent_size": 32, "expert_shared_count": 1, "expert_shared_feed_forward_length": 96,
    "expert_weights_norm": True, "expert_weights_scale": 2.5,
}  # fmt: skip
DEEPSEEK4 = SINKHORN | MTP | {
    "attention.head_count_kv": 1, "attention.key_length": 32, "attention.value_length": 32,
    "attention.q_lora_rank": 32, "attention.sliding_window": 32, "rope.dimension_count": 16,
    "expert_shared_count": 1, "expert_weights_scale": 1.5, "expert_weights_norm": True, "expert_gating_func": 4,
    "swiglu_clamp_exp": 10.0, "attention.indexer.head_count": 4, "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 64, "attention.output_group_count": 2, "attention.output_lora_rank": 32,
    "attention.compress_rope_freq_base": 160000.0, "attention.compress_ratios": [0, 4, 128, 0, 0],
    "hash_layer_count": 1,
}  # fmt: skip
DOTS3 = window(16, [0, 1, 0, 1, 1]) | {
    "attention.indexer.types": [1, 0, 1, 0, 0], "attention.kv_lora_rank_swa": 32, "attention.key_length_swa": 48,
    "attention.value_length_swa": 32, "attention.key_length_mla_swa": 48, "attention.value_length_mla_swa": 32,
    "rope.freq_base_swa": 10000.0,
}  # fmt: skip
STEP = window(16, [0, 1, 1, 0, 1]) | {"expert_shared_feed_forward_length": 96, "rope.dimension_count": K}
BERT = {
    "moe_every_n_layers": 2, "pooling_type": 1, "expert_used_count": 2, "expert_count": 8, "attention.causal": False,
    "feed_forward_length": X, "attention.head_count_kv": H,
}  # fmt: skip
BERT_TOKENS = {"token_type_count": 1, "mask_token_id": 257, "cls_token_id": 256, "seperator_token_id": 256}
MINIMAX3 = dotted(
    {"attention__indexer__head_count": J, "attention__indexer__key_length": 32, "attention__indexer__top_k": 2,
     "attention__indexer__block_size": 4, "attention__indexer__local_blocks": 1, "rope__dimension_count": 8}
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    # softmax or sigmoid over plain attention
    "afmoe": Family("afmoe", base() | SHARED | {"leading_dense_block_count": 2, "attention.sliding_window": 16}),
    "bailingmoe": Family(
        "bailingmoe", base(rope__dimension_count=K) | SHARED | {"expert_shared_count": 2}, QKV_BIAS
    ),
    "deepseek": Family(
        "deepseek", base(attention__head_count_kv=H) | SHARED | {"expert_shared_count": 2}, QKV_BIAS
    ),
    "deepseek2-ocr": Family("deepseek2-ocr", base(attention__head_count_kv=H) | SHARED, QKV_BIAS),
    "deepseek2-ocr-unfused": Family(
        "deepseek2-ocr", base(attention__head_count_kv=H) | SHARED, QKV_BIAS, unfused=True
    ),
    "exaone-moe": Family(
        "exaone-moe", base() | SHARED | GROUPED | {"attention.sliding_window": 16}, QKV_BIAS
    ),
    "exaone-moe-mtp": Family(
        "exaone-moe", base() | SHARED | {"attention.sliding_window": 16}, QKV_BIAS + "|rope_freqs", skipped=True
    ),
    "granite-moe": Family("granite", base() | GRANITE, QKV_BIAS),
    "granite_swa-moe": Family("granite_swa", base() | GRANITE | window(16, [1, 0, 1, 0, 1]), QKV_BIAS),
    "granitehybrid": Family(
        "granitehybrid", base(attention__head_count_kv=[0, 2, 0, 2, 0]) | GRANITE | MAMBA2, QKV_BIAS
    ),
    "laguna": Family("laguna", base(attention__sliding_window=16, rope__dimension_count_swa=8) | SHARED),
    "laguna-full": Family("laguna", base() | SHARED),
    "maple": Family("maple", base(swiglu_clamp_exp=7.0) | window(16, [1, 0, 1, 0, 1])),
    "mellum": Family("mellum", base(attention__sliding_window=16)),
    "mellum-full": Family("mellum", base()),
    "minimax-01": Family(
        "minimax-01", base(residual_scale=3.55, full_attention_interval=2, feed_forward_length=X)
    ),
    "minimax-m3": Family("minimax-m3", base() | SHARED | MINIMAX3, QKV_BIAS),
    "mistral3-moe": Family("mistral3", base(feed_forward_length=X), QKV_BIAS),
    "mistral4": Family("mistral4", base() | MLA | SHARED),
    "qwen3vlmoe": Family(
        "qwen3vlmoe", base(rope__dimension_sections=[2, 3, 3, 0], n_deepstack_layers=2), QKV_BIAS
    ),
    "minicpm-moe": Family("minicpm", base(feed_forward_length=X), QKV_BIAS),
    "llama-embed-moe": Family("llama-embed", base(feed_forward_length=X), QKV_BIAS),
    # not causal
    "llada-moe": Family("llada-moe", base(attention__head_count_kv=H)),
    "rnd1": Family("rnd1", base()),
    "nomic-bert-moe": Family(
        "nomic-bert-moe", base() | BERT, r"attn_[qk]_norm|attn_norm_2", tokenizer=BERT_TOKENS
    ),
    "qwen3moe-not-causal": Family("qwen3moe", base(attention__causal=False), QKV_BIAS),
    # attention of their own
    "deepseek32": Family("deepseek32", base() | MLA | SHARED | INDEXER),
    "deepseek32-mtp": Family("deepseek32", base(6) | MLA | SHARED | INDEXER | MTP),
    "deepseek2-mtp": Family("deepseek2", base(6) | MLA | SHARED | GROUPED | MTP, r"attn_kv_b"),
    "glm-dsa": Family("glm-dsa", base() | MLA | SHARED | INDEXER),
    "glm-dsa-mtp": Family(
        "glm-dsa",
        base(6, context_length=1 << 20, attention__indexer__types=[1, 1, 0, 1, 0]) | MLA | SHARED | INDEXER | MTP,
        r"blk\.[24]\.indexer",
    ),
    "glm5-next": Family(
        "glm5-next",
        base() | HYBRID | NO_ROPE | SHARED | INDEXER | KDA | SINKHORN
        | {"attention.indexer.kpool": 4, "swiglu_clamp_exp": 7.0},
    ),
    "glm5-next-mtp": Family(
        "glm5-next",
        base(6) | HYBRID_MTP | NO_ROPE | SHARED | INDEXER | KDA | SINKHORN | MTP | {"attention.indexer.kpool": 4},
    ),
    "dots3note": Family("dots3note", base() | DOTS3 | MLA | SHARED | INDEXER),
    "hy_v3": Family(
        "hy_v3", base(expert_shared_feed_forward_length=96) | SHARED, QKV_BIAS, dense_first=True
    ),
    "hy_v3-mtp": Family(
        "hy_v3", base(6, expert_shared_feed_forward_length=96) | SHARED | MTP, QKV_BIAS, dense_first=True
    ),
    "hy_v4": Family(
        "hy_v4",
        base() | MLA | SHARED | INDEXER | HYPER
        | {"hyper_connection.magnitude": 2.0, "swiglu_clamp_exp": 10.0, "attention.indexer.types": [1, 0, 1, 0, 1]},
    ),
    "step35": Family(
        "step35",
        base(swiglu_clamp_exp=[0.0, 0.0, 7.0, 7.0, 0.0], expert_weights_norm=True, expert_weights_scale=1.5) | STEP,
        dense_first=True,
    ),
    "step35-mtp": Family(
        "step35",
        base(7, nextn_predict_layers=2) | STEP | window(16, [0, 1, 1, 0, 1, 1, 1]),
        dense_first=True,
    ),
    "mimo2": Family(
        "mimo2",
        base(attention__value_length=8, attention__value_scale=0.7) | window(16, [0, 1, 1, 0, 1]),
        QKV_BIAS,
        dense_first=True,
    ),
    "mimo2-mtp": Family(
        "mimo2",
        base(6, attention__value_length=8) | window(16, [0, 1, 1, 0, 1, 1]) | MTP,
        QKV_BIAS,
        dense_first=True,
    ),
    "k2-horizon": Family(
        "k2-horizon",
        base(
            attention__value_expert_count=8, attention__value_expert_used_count=2, attention__group_norm_groups=4
        )
        | SHARED,
    ),
    "k2-horizon-plain": Family("k2-horizon", base() | SHARED),
    # linear attention
    "qwen35moe": Family("qwen35moe", base(6) | DELTA),
    "qwen35moe-unfused": Family("qwen35moe", base(6) | DELTA, unfused=True),
    "qwen35moe-mtp": Family("qwen35moe", base(7) | DELTA | MTP),
    "qwen3next-mtp": Family("qwen3next", base(7) | DELTA | MTP),
    "kimi-linear": Family("kimi-linear", base(attention__head_count=[4] * 5) | HYBRID | SHARED | KDA),
    "kimi-k3": Family("kimi-k3", base(expert_latent_length=32) | HYBRID | SHARED | KDA | KIMI),
    "kimi-k3-plain": Family("kimi-k3", base() | HYBRID | SHARED | KDA | KIMI),
    "bailingmoe3": Family(
        "bailingmoe3",
        base(
            attention__head_count=[4] * 5,
            rope__dimension_sections=[2, 3, 3, 0],
            swiglu_clamp_exp=[0.0, 4.0, 0.0, 4.0, 4.0],
        )
        | HYBRID | SHARED | KDA | GROUPED,
    ),
    "bailingmoe3-mtp": Family(
        "bailingmoe3", base(6, attention__head_count=[4] * 6) | HYBRID_MTP | SHARED | KDA | MTP
    ),
    "qwen4exp": Family("qwen4exp", base(4) | QWEN4),
    "qwen4exp-unfused": Family("qwen4exp", base(4) | QWEN4, unfused=True),
    # embeddings of every layer's
    "gemma4": Family("gemma4", base(6, attention__shared_kv_layers=0) | GEMMA, keep=GEMMA_SCALES),
    "gemma4-shared": Family("gemma4", base(6, attention__shared_kv_layers=3) | GEMMA, keep=GEMMA_SCALES),
    # blocks of prediction, layers with different numbers of experts, scales
    "cohere2moe-mtp": Family(
        "cohere2moe",
        base(6, logit_scale=1.0, expert_shared_feed_forward_length=96) | SHARED | MTP | window(16, 2),
        QKV_BIAS + r"|rope_freqs|attn_._norm",
    ),
    "nemotron_h_moe-mtp": Family("nemotron_h_moe", base(6) | NEMOTRON, QKV_BIAS),
    "deepseek4-mtp": Family("deepseek4", base() | DEEPSEEK4, nextn=True),
    "glm4moe-mtp": Family("glm4moe", base(6, rope__dimension_count=8) | SHARED | MTP),
    "qwen3moe-scales": Family("qwen3moe", base(), QKV_BIAS + r"|input_scale", keep=r"exps\.scale"),
    "qwen3moe-input-scales": Family("qwen3moe", base(), QKV_BIAS, keep=r"exps\.(input_)?scale"),
}  # fmt: skip


def family(name: str, wanted: Wanted) -> Family:
    """The family called `name`, with a library to ask for its tensors."""
    found = FAMILIES[name.removesuffix(WIDE)]
    return replace(found.wide() if name.endswith(WIDE) else found, wanted=wanted)


__all__ = ["FAMILIES", "Family", "family", "vocabulary"]
