"""The experts asked for lately while decoding, and what they say about other pool sizes."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

IDS = 4096  # kept of each layer: 512 tokens of 8 experts


@njit(cache=True)
def reuse_histogram(
    ids: NDArray[np.int16], n_experts: int
) -> NDArray[np.int64]:  # pragma: no cover - compiled
    """Histogram int64 [E] of the LRU stack distances in ids [n] (-1: none); first uses are left out.

    An LRU cache of c slots hits what is below c.
    """
    stack = np.empty(n_experts, np.int64)
    height = 0
    histogram = np.zeros(n_experts, np.int64)
    for e in ids:
        if e < 0:
            continue
        position = -1
        for i in range(height):
            if stack[i] == e:
                position = i
                break
        if position >= 0:
            histogram[position] += 1
        else:
            position = height
            height += 1
        for i in range(position, 0, -1):
            stack[i] = stack[i - 1]
        stack[0] = e
    return histogram


class RecentRouting:
    """A ring of each layer's last requests. Noting them takes a microsecond; all else waits until somebody asks."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self._ids = np.full((n_layers, IDS), -1, np.int16)
        self._at = [0] * n_layers
        self._n_experts = n_experts

    def add(self, layer: int, ids: NDArray[np.int32]) -> None:
        """A layer was asked for `ids` [n]."""
        at, n = self._at[layer], len(ids)
        if at + n > IDS:
            at = 0
        if n <= IDS:
            self._ids[layer, at : at + n] = ids
            self._at[layer] = at + n

    def misses(self, slots: float) -> float:
        """Requests for experts seen before that an LRU cache of `slots` slots per layer would have missed."""
        whole = min(int(slots), self._n_experts)
        total = 0.0
        for ids, at in zip(self._ids, self._at, strict=True):
            histogram = reuse_histogram(np.roll(ids, -at), self._n_experts)
            total += float(histogram[whole:].sum())
            if whole < self._n_experts:
                total -= (slots - whole) * float(histogram[whole])
        return total
