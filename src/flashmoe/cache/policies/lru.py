"""Least recently used: evict the expert whose last request is longest ago."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.kernels import entries as loops
from flashmoe.cache.policies.base import EvictionPolicy


class LruState(NamedTuple):
    """Recency, over the whole session."""

    last: NDArray[np.float64]  # [L, E] step of the last request, 0 if never


def record(st, res, layer, ids, n):
    for i in range(n):
        st.last[layer, ids[i]] = res.step[0]


def victim(st, res, layer, g):
    return loops.lowest(st.last, res, layer, g)


class Lru(EvictionPolicy):
    """Evicts the longest unused; the baseline of every comparison."""

    name = "lru"
    suggested = True
    kernels = loops.compiled(LruState, record, victim)

    def make_state(self, n_layers: int, n_experts: int) -> LruState:
        return LruState(last=np.zeros((n_layers, n_experts)))
