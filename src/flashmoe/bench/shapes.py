"""The shapes of real MoE models: metadata and tensors as llama.cpp expects them of each architecture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from flashmoe.errors import UsageError

_ROW = 64  # a scaled row stays a multiple of this: whole blocks of the 32-weight formats


class Tensor(NamedTuple):
    """Dimensions in ggml's order, row length first. `sigma` 0.0 stands for ones: a norm."""

    name: str
    dims: tuple[int, ...]
    sigma: float
    plain: bool = False  # float32, not quantised


@dataclass(frozen=True)
class Shape:
    """One model's sizes. `latent`: size of the compressed keys and values (DeepSeek's attention), 0: ordinary heads."""

    arch: str
    layers: int
    embd: int
    heads: int
    kv_heads: int
    head: int
    experts: int
    top_k: int
    expert_ff: int
    vocab: int
    context: int
    rope_base: float
    dense_layers: int = 0
    dense_ff: int = 0
    shared_ff: int = 0
    latent: int = 0
    rope: int = 0
    value: int = 0
    window: int = 0

    def scaled(self, factor: float) -> Shape:
        """The same model, smaller in layers, width, experts and vocabulary. Raises UsageError for a wrong factor."""
        if not 0 < factor <= 1:
            raise UsageError(f"--scale {factor}: give a number above 0, at most 1")
        if factor == 1:
            return self

        def row(n: int) -> int:
            return max(_ROW, round(n * factor / _ROW) * _ROW) if n else 0

        heads = max(2, round(self.heads * factor))
        group = max(1, self.heads // self.kv_heads)
        width = heads * self.head if self.arch == "olmoe" else max(256, row(self.embd))
        return replace(
            self,
            layers=self.dense_layers + max(2, round((self.layers - self.dense_layers) * factor)),
            embd=width,
            heads=heads,
            kv_heads=max(1, heads // group),
            experts=max(2 * self.top_k, round(self.experts * factor)),
            expert_ff=row(self.expert_ff),
            dense_ff=row(self.dense_ff),
            shared_ff=row(self.shared_ff),
            vocab=max(512, round(self.vocab * factor)),
        )

    def metadata(self) -> dict[str, Any]:
        """Keys of the architecture, without its prefix."""
        keys: dict[str, Any] = {
            "block_count": self.layers,
            "context_length": self.context,
            "embedding_length": self.embd,
            "feed_forward_length": self.dense_ff or self.expert_ff,
            "attention.head_count": self.heads,
            "attention.head_count_kv": 1 if self.latent else self.kv_heads,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": self.rope_base,
            "expert_count": self.experts,
            "expert_used_count": self.top_k,
            "expert_feed_forward_length": self.expert_ff,
        }
        if self.latent:
            keys |= {
                "attention.q_lora_rank": 0,
                "attention.kv_lora_rank": self.latent,
                "attention.key_length": self.latent + self.rope,
                "attention.value_length": self.latent,
                "attention.key_length_mla": self.head,
                "attention.value_length_mla": self.value,
                "rope.dimension_count": self.rope,
                "leading_dense_block_count": self.dense_layers,
                "expert_shared_count": self.shared_ff // self.expert_ff or 1,
                "expert_weights_scale": 1.0,
                "expert_gating_func": 1,
            }
        else:
            keys |= {"attention.key_length": self.head, "attention.value_length": self.head}
        if self.window:
            keys["attention.sliding_window"] = self.window
        return keys

    def tensors(self) -> Iterator[Tensor]:
        """All tensors in the order of the file."""
        yield Tensor("token_embd.weight", (self.embd, self.vocab), 1.0)
        for number in range(self.layers):
            for tensor in (*self._attention(), *self._feed_forward(number)):
                yield tensor._replace(name=f"blk.{number}.{tensor.name}")
        yield _norm("output_norm", self.embd)
        yield Tensor("output.weight", (self.embd, self.vocab), 1.5 / self.embd**0.5)

    def _attention(self) -> Iterator[Tensor]:
        yield _norm("attn_norm", self.embd)
        if self.latent:
            without_position = self.head - self.rope
            yield _matrix("attn_q", self.embd, self.heads * self.head)
            yield _matrix("attn_kv_a_mqa", self.embd, self.latent + self.rope)
            yield _norm("attn_kv_a_norm", self.latent)
            yield _matrix("attn_k_b", without_position, self.latent, self.heads)
            yield _matrix("attn_v_b", self.latent, self.value, self.heads)
            yield _matrix("attn_output", self.heads * self.value, self.embd)
            return
        queries, keys = self.heads * self.head, self.kv_heads * self.head
        yield _matrix("attn_q", self.embd, queries)
        yield _matrix("attn_k", self.embd, keys)
        yield _matrix("attn_v", self.embd, keys)
        yield _matrix("attn_output", queries, self.embd)
        if self.arch == "gpt-oss":
            for name, size in (("q", queries), ("k", keys), ("v", keys), ("output", self.embd)):
                yield _small(f"attn_{name}.bias", size)
            yield _small("attn_sinks.weight", self.heads)
        else:
            whole = self.arch == "olmoe"
            yield _norm("attn_q_norm", queries if whole else self.head)
            yield _norm("attn_k_norm", keys if whole else self.head)

    def _feed_forward(self, layer: int) -> Iterator[Tensor]:
        d, e, x = self.embd, self.experts, self.expert_ff
        oss = self.arch == "gpt-oss"
        yield _norm("post_attention_norm" if oss else "ffn_norm", d)
        if layer < self.dense_layers:
            yield from _gated("", d, self.dense_ff)
            return
        yield Tensor("ffn_gate_inp.weight", (d, e), 1.5 / d**0.5, plain=True)
        yield from _gated("_exps", d, x, e)
        if self.shared_ff:
            yield from _gated("_shexp", d, self.shared_ff)
        if oss:
            yield _small("ffn_gate_inp.bias", e)
            for name, size in (("gate", x), ("up", x), ("down", d)):
                yield _small(f"ffn_{name}_exps.bias", size, e)


def _matrix(name: str, *dims: int) -> Tensor:
    return Tensor(f"{name}.weight", dims, dims[0] ** -0.5)


def _norm(name: str, n: int) -> Tensor:
    return Tensor(f"{name}.weight", (n,), 0.0, plain=True)


def _small(name: str, *dims: int) -> Tensor:
    return Tensor(name, dims, 0.1, plain=True)


def _gated(suffix: str, embd: int, ff: int, *experts: int) -> Iterator[Tensor]:
    yield _matrix(f"ffn_gate{suffix}", embd, ff, *experts)
    yield Tensor(f"ffn_down{suffix}.weight", (ff, embd, *experts), 2.0 * ff**-0.5)
    yield _matrix(f"ffn_up{suffix}", embd, ff, *experts)


SHAPES = {
    "OLMoE-1B-7B": Shape("olmoe", 16, 2048, 16, 16, 128, 64, 8, 1024, 50304, 4096, 1e4),
    "DeepSeek-V2-Lite": Shape(
        "deepseek2",
        27,
        2048,
        16,
        16,
        192,
        64,
        6,
        1408,
        102400,
        32768,
        1e4,
        dense_layers=1,
        dense_ff=10944,
        shared_ff=2816,
        latent=512,
        rope=64,
        value=128,
    ),
    "Qwen3-30B-A3B": Shape("qwen3moe", 48, 2048, 32, 4, 128, 128, 8, 768, 151936, 40960, 1e6),
    "gpt-oss-120b": Shape("gpt-oss", 36, 2880, 64, 8, 64, 128, 4, 2880, 201088, 131072, 1.5e5, window=128),
    "gpt-oss-20b": Shape("gpt-oss", 24, 2880, 64, 8, 64, 32, 4, 2880, 201088, 131072, 1.5e5, window=128),
}


def find_shape(name: str) -> tuple[str, Shape]:
    """A shape by its name, in any case of letters. Raises UsageError."""
    for known, shape in SHAPES.items():
        if known.lower() == name.lower():
            return known, shape
    raise UsageError(f"unknown shape {name!r}: choose from {', '.join(SHAPES)}")
