"""Embeddings: a text evaluated as a prompt, a micro-batch at a time, and the one vector that llama.cpp pools of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flashmoe.engines.base import Engine
from flashmoe.engines.llamacpp.context import POOLING
from flashmoe.errors import UsageError
from flashmoe.generation import check_prompt, split
from flashmoe.storage.gguf import GGUF

if TYPE_CHECKING:
    from flashmoe.model import Model


def choose_pooling(wished: str, gguf: GGUF) -> str:
    """`wished`, or with "auto" what the model's file says: "none" where it says nothing. Raises UsageError."""
    if wished == "auto":
        said = gguf.arch_value("pooling_type")
        return next((name for name, number in POOLING.items() if number == said), "none")
    if wished not in POOLING:
        raise UsageError(f"unknown pooling {wished!r}: use auto, {', '.join(POOLING)}")
    return wished


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
    if len(tokens) > engine.n_ubatch and engine.pooling != "last":
        raise UsageError(
            f"the text has {len(tokens)} tokens, and pooling {engine.pooling!r} sees {engine.n_ubatch} at once: "
            "shorten it, or raise -ub"
        )
    return tokens


class Embedding:
    """One text being embedded, in one sequence of a model's engine. Call `step` until `finished`, then `close`."""

    made: Sequence[int] = ()
    reused = 0

    def __init__(self, model: Model, tokens: Sequence[int], *, sequence: int = 0) -> None:
        """Nothing is evaluated yet. tokens: of `embedding_tokens`."""
        self.sequence = sequence
        self._model, self._tokens = model, tokens
        self._todo = deque(split(tokens, model.engine.n_ubatch))
        self._begun = False
        #: "stop" when there is a `vector`.
        self.finished: str | None = None
        self.vector: NDArray[np.float32] = np.zeros(0, np.float32)

    def step(self) -> None:
        """Evaluate the next micro-batch. Raises what the engine's `decode` raises; it is over then."""
        if not self._begun:
            self._model.keep(self.sequence, 0, goes_on=False)
            self._begun = True
        self._model.evaluate(self._todo.popleft(), self.sequence, decode=False, embed=True)
        if not self._todo:
            self.vector = normalized(self._model.engine.embedding(self.sequence))
            self.finished = "stop"

    def run(self) -> NDArray[np.float32]:
        """To the end; the vector. Raises what `step` raises."""
        try:
            while not self.finished:
                self.step()
        finally:
            self.close()
        return self.vector

    def close(self) -> None:
        """No later prompt goes on from here."""
        self._model.held[self.sequence].cut(0)


def normalized(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """`vector` at length 1, rounded as llama.cpp's server does it."""
    squares = (vector * vector).astype(np.float64)
    length = np.sqrt(np.cumsum(squares)[-1])  # a sum in order
    return vector * np.float32(1 / length if length else 0)
