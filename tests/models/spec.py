"""How a tiny model is described: :class:`Spec`, the notation of its tensors, and the common vocabulary.

A layer is a string of `name:dimensions` items, dimensions in ggml's order (row length first). `name` stands
for `blk.N.name.weight` unless it has a suffix of its own (`attn_q.bias`) or ends in a dot (`ssm_a.`: none).
Letters are the sizes in `SIZES`, overridden and extended per model:

    D embedding   V vocabulary   H heads       K head size      A = heads x head size
    F dense FFN   X expert FFN   J kv heads    E experts        G = kv heads x head size
    S shared FFN  XX = 2X, 2D    T experts used per token
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

TOP = "token_embd:D,V output_norm:D output:D,V "
SIZES = {"D": 64, "F": 128, "X": 96, "S": 96, "E": 8, "T": 2, "H": 4, "J": 2, "K": 16}


class U64(int):
    """A number that is written with 64 bits, in a list."""


@dataclass(frozen=True)
class Spec:
    """One tiny model: what it is for, its sizes, metadata, tensors and quantisation."""

    arch: str
    about: str
    layers: tuple[str, ...]
    quants: tuple[str, ...] = ("Q4_0", "Q8_0")
    """Per MoE layer, in turn: one format for all weights, or gate, up and down; fused: gate_up and down."""
    sizes: str = ""
    """`letter=number` items over `SIZES`."""
    keys: str = ""
    """`key=value` items over the default metadata, no prefix, values in JSON; null removes a default."""
    top: str = TOP
    rest: str = "Q8_0"
    """Format of the matrices that are not experts."""
    chat: bool = False
    alignment: int = 32
    router_scale: float = 2.0

    def dims(self) -> dict[str, int]:
        """The sizes, with those that follow from others."""
        d = {**SIZES, "V": len(vocabulary()[0]), **_parse(self.sizes)}
        return {"A": d["H"] * d["K"], "G": d["J"] * d["K"], "XX": 2 * d["X"], "2D": 2 * d["D"], **d}

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
    rest, *weights = formats
    for item in items.split():
        name, letters = item.split(":")
        shape = tuple(int(x) if x.isdigit() else dims[x] for x in letters.split(","))
        kind = rest
        if name.endswith("exps") and len(shape) == 3:
            order = ("gate", "up", "down") if len(weights) == 3 else ("gate", "down")
            kind = weights[0] if len(weights) == 1 else weights[order.index(name.split("_")[1])]
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
