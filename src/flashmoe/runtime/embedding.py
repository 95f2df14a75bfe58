"""Embeddings: which texts can be embedded, and their vectors, as llama.cpp's server makes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flashmoe.engines.base import Engine
from flashmoe.engines.llamacpp.context import POOLING
from flashmoe.errors import UsageError
from flashmoe.runtime.decoder import Decoder
from flashmoe.runtime.generation import check_prompt, split
from flashmoe.storage.gguf import GGUF


def choose_pooling(wished: str, gguf: GGUF) -> str:
    """`wished`, or with "auto" what the model's file says: "none" where it says nothing. Raises UsageError."""
    if wished == "auto":
        said = gguf.arch_value("pooling_type")
        return next((name for name, number in POOLING.items() if number == said), "none")
    if wished not in POOLING:
        raise UsageError(f"unknown pooling {wished!r}: use auto, {', '.join(POOLING)}")
    return wished


def embed(decoder: Decoder, text: str | Sequence[int]) -> NDArray[np.float32]:
    """The embedding of a text (or of token ids), float32 [n_embd], of length 1.

    Raises UsageError where the model gives no embeddings, or not of this text.
    """
    decoder.rewind()
    for chunk in split(embedding_tokens(decoder.engine, text), decoder.engine.n_ubatch):
        decoder.evaluate(chunk, decode=False, embed=True)
    return normalized(decoder.engine.embedding())


def embedding_tokens(engine: Engine, text: str | Sequence[int]) -> list[int]:
    """The tokens of a text that is to be embedded, as llama.cpp's server reads it; token ids as they are.

    Raises UsageError where the model gives no embeddings, or not of this text.
    """
    if engine.pooling == "none":
        raise UsageError(
            "this model gives no embeddings: its file names no pooling; choose one (--pooling last, mean or cls)"
        )
    tokens = engine.tokenize(text, special=True) if isinstance(text, str) else list(text)
    check_prompt(tokens, engine.n_ctx)
    if any(token >= engine.n_vocab for token in tokens):
        raise UsageError(f"token ids must be below {engine.n_vocab}")
    remembers = engine.pooling == "last" and not engine.no_text
    if len(tokens) > engine.n_ubatch and not remembers:
        raise UsageError(
            f"the text has {len(tokens)} tokens, and pooling {engine.pooling!r} sees {engine.n_ubatch} at once: "
            "shorten it, or raise -ub"
        )
    return tokens


def normalized(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """`vector` at length 1, rounded as llama.cpp's server does it."""
    squares = (vector * vector).astype(np.float64)
    length = np.sqrt(np.cumsum(squares)[-1])  # a sum in order
    return vector * np.float32(1 / length if length else 0)
