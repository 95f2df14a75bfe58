"""The tokens that a benchmark replays. They are given, not generated: both sides evaluate the same ones."""

from __future__ import annotations

import ctypes as C
import importlib.util
from pathlib import Path

import numpy as np

from flashmoe.engines.llamacpp.library import Library
from flashmoe.errors import ModelError, UsageError
from flashmoe.storage.gguf import GGUF

_ZIPF_EXPONENT = 1.0
ROUTINGS = ("uniform", "zipf", "text")


def make_tokens(routing: str, n: int, gguf: GGUF, lib: Library, seed: int) -> list[int]:
    """`n` token ids: "uniform" or "zipf" over the vocabulary, "text", or "text:FILE". Any other routing: uniform."""
    if routing == "text" or routing.startswith("text:"):
        return text_tokens(_text(routing), n, gguf.files[0], lib)
    vocabulary = vocabulary_size(gguf)
    draw = np.random.default_rng(seed)
    if routing != "zipf":
        return [int(token) for token in draw.integers(0, vocabulary, n)]
    weights = np.arange(1, vocabulary + 1, dtype=np.float64) ** -_ZIPF_EXPONENT
    ranks = draw.choice(vocabulary, n, p=weights / weights.sum())
    return [int(token) for token in draw.permutation(vocabulary)[ranks]]


def vocabulary_size(gguf: GGUF) -> int:
    """Tokens that the model has embeddings for."""
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{gguf.files[0]}: has no token_embd.weight")
    return int(embedding.shape[1])


def text_tokens(text: str, n: int, model: Path, lib: Library) -> list[int]:
    """The first `n` tokens of a text, in the model's own vocabulary. Raises UsageError where it is too short."""
    params = lib.llama_model_default_params()
    params.vocab_only = True
    pointer = lib.llama_model_load_from_file(str(model).encode(), params)
    if not pointer:
        raise ModelError(f"{model}: llama.cpp cannot read its vocabulary ({' '.join(lib.messages[-2:])})")
    try:
        data = text.encode()[: 64 * n]
        tokens = (C.c_int32 * (len(data) + 8))()
        vocabulary = lib.llama_model_get_vocab(pointer)
        made = lib.llama_tokenize(vocabulary, data, len(data), tokens, len(tokens), True, False)
    finally:
        lib.llama_model_free(pointer)
    if made < n:
        raise UsageError(
            f"the text has {made} tokens, {n} are needed: give a longer one (--routing text:FILE)"
        )
    return list(tokens[:n])


def _text(routing: str) -> str:
    name = routing.partition(":")[2]
    if not name:  # English that every Python has at hand: the language reference's help texts
        spec = importlib.util.find_spec("pydoc_data.topics")
        if not spec or not spec.origin:
            raise UsageError("this Python comes without its help texts: give a text with --routing text:FILE")
        name = spec.origin
    try:
        return Path(name).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{name}: the text cannot be read ({error.strerror})") from None
