"""A micro-batch of a prompt comes layer by layer; predictors that follow text want it token by token."""

from __future__ import annotations

import numpy as np

from flashmoe.prefetch.base import Int32, Predictor


class MicroBatch:
    """Collects what `Predictor.observe_many` is told: L layers, k experts per token."""

    def __init__(self, n_layers: int, top_k: int) -> None:
        self.n_layers, self.top_k = n_layers, top_k
        self._layers: list[Int32] = []  # each [T, k]
        self._tokens: Int32 = np.zeros(0, np.int32)

    def __bool__(self) -> bool:
        return bool(self._layers)

    def begins_with(self, layer: int) -> bool:
        """Whether this layer cannot belong to the micro-batch under way."""
        return layer < len(self._layers)

    def add(self, layer: int, ids: Int32, tokens: Int32) -> bool:
        """Take a layer's ids [T, k] and tokens [T]; True where it was the last layer."""
        nothing = np.full((0, self.top_k), -1, np.int32)
        self._layers += [nothing] * (layer - len(self._layers))
        self._layers.append(np.array(ids[:, : self.top_k], np.int32))
        if len(tokens) >= len(self._tokens):
            self._tokens = np.array(tokens, np.int32)
        return layer == self.n_layers - 1

    def take(self, last: int | None = None) -> tuple[Int32, Int32]:
        """The ids [T, L, k] (-1 where a layer did not see a token) and tokens [T] of all rows, or of the `last`
        ones; afterwards it is empty."""
        n = max([len(self._tokens), *(len(ids) for ids in self._layers)])
        text = np.full((n, self.n_layers, self.top_k), -1, np.int32)
        for layer, ids in enumerate(self._layers):
            text[n - len(ids) :, layer, : ids.shape[1]] = ids
        tokens = np.full(n, -1, np.int32)
        tokens[n - len(self._tokens) :] = self._tokens
        self._layers, self._tokens = [], np.zeros(0, np.int32)
        keep = slice(max(0, n - last), None) if last is not None else slice(None)
        return np.ascontiguousarray(text[keep]), np.ascontiguousarray(tokens[keep])


class TextPredictor(Predictor):
    """A predictor that follows text token by token: a micro-batch reaches it when its last layer has come."""

    def __init__(self) -> None:
        super().__init__()
        self._batch = MicroBatch(0, 0)

    def follow(self, batch: MicroBatch) -> None:
        """Observe the tokens of a micro-batch."""
        raise NotImplementedError

    def bind(self, n_layers: int, n_experts: int, top_k: int) -> None:
        super().bind(n_layers, n_experts, top_k)
        self._batch = MicroBatch(n_layers, top_k)

    def observe_many(self, layer: int, ids: Int32, tokens: Int32) -> None:
        if self._batch.begins_with(layer):
            self._settle()
        if self._batch.add(layer, ids, tokens):
            self._settle()

    def _settle(self) -> None:
        """Follow the micro-batch under way, whole or in part; to be called before the state is used otherwise."""
        if self._batch:
            self.follow(self._batch)
