"""Least frequently used: evict the expert with the fewest requests in this sequence."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.kernels import entries as loops
from flashmoe.cache.policies.base import EvictionPolicy

# One key orders by count first and, among equal counts, by recency: count * 2^36 + step of the last request.
COUNT = float(1 << 36)


class LfuState(NamedTuple):
    """Counts and recency in one key, exact up to 2^17 requests and 2^36 steps."""

    key: NDArray[np.float64]  # [L, E] count * COUNT + step of the last request
    counts: NDArray[np.float64]  # [L, E] requests since the sequence began (or since insertion: forget)
    forget: NDArray[np.uint8]  # [1] 1: the count of an evicted expert starts again from zero


def record(st, res, layer, ids, n):
    for i in range(n):
        st.counts[layer, ids[i]] += 1.0
        st.key[layer, ids[i]] = st.counts[layer, ids[i]] * COUNT + res.step[0]


def victim(st, res, layer, g):
    return loops.lowest(st.key, res, layer, g)


def evicted(st, res, layer, expert):
    if st.forget[0] == 1:
        st.counts[layer, expert] = 0.0
        st.key[layer, expert] = 0.0


def begin(st):
    if st.forget[0] == 1:
        return
    for layer in range(st.counts.shape[0]):
        for e in range(st.counts.shape[1]):
            st.key[layer, e] -= st.counts[layer, e] * COUNT  # recency stays as the tie-break
            st.counts[layer, e] = 0.0


class Lfu(EvictionPolicy):
    """Evicts the fewest requests in this sequence; equal counts: the longest unused.

    forget: count since insertion into the cache, over all sequences (the textbook's in-cache LFU), instead.
    """

    name = "lfu"
    kernels = loops.compiled(LfuState, record, victim, evicted, begin)
    fixed = frozenset({"forget"})

    def __init__(self, forget: bool = False) -> None:
        super().__init__()
        self.forget = forget

    def make_state(self, n_layers: int, n_experts: int) -> LfuState:
        shape = (n_layers, n_experts)
        return LfuState(np.zeros(shape), np.zeros(shape), np.array([self.forget], np.uint8))
