"""The routing of one graph, noted by compiled code for observers that are told when the graph has ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import carray
from numpy.typing import NDArray

from flashmoe.common.compiled import float32_at, int32_at, int64_at
from flashmoe.common.kept import kept

TOKENS = 64  # of graphs that are noted: those of longer prompts have time for Python

_HEAD = 3  # numbers before the table: addresses of ids and of weights, and their room for each layer


class RoutingLog:
    """Ids and weights of every layer of one graph of at most TOKENS tokens."""

    def __init__(self, n_layers: int, top_k: int) -> None:
        room = TOKENS * top_k
        self._ids = np.zeros((n_layers, room), np.int32)
        self._weights = np.zeros((n_layers, room), np.float32)
        self._table = np.zeros(_HEAD + 2 * n_layers, np.int64)
        self._table[:_HEAD] = self._ids.ctypes.data, self._weights.ctypes.data, room
        self._sizes = self._table[_HEAD:].reshape(n_layers, 2)  # tokens and experts per token
        #: What `note` takes.
        self.address = int(self._table.ctypes.data)

    def take(self) -> Iterator[tuple[int, NDArray[np.int32], NDArray[np.float32]]]:
        """Every layer that was noted, its ids and weights [tokens, k]; afterwards nothing is."""
        sizes = self._sizes.tolist()
        self._sizes[:] = 0
        for layer, (tokens, top_k) in enumerate(sizes):
            if tokens:
                n = tokens * top_k
                yield (
                    layer,
                    self._ids[layer, :n].reshape(tokens, top_k),
                    self._weights[layer, :n].reshape(tokens, top_k),
                )


@kept()
def note(log: Any, layer: Any, ids: Any, weights: Any, tokens: Any, top_k: Any) -> Any:
    """Keep a layer's ids, int32, and weights, float32, [tokens, top_k] at addresses. log: RoutingLog.address."""
    head = carray(int64_at(log), _HEAD)
    n, at = tokens * top_k, 4 * head[2] * layer
    picked, kept_ids = carray(int32_at(ids), n), carray(int32_at(head[0] + at), n)
    given, kept_weights = carray(float32_at(weights), n), carray(float32_at(head[1] + at), n)
    for i in range(n):
        kept_ids[i], kept_weights[i] = picked[i], given[i]
    sizes = carray(int64_at(log + 8 * (_HEAD + 2 * layer)), 2)
    sizes[0], sizes[1] = tokens, top_k
