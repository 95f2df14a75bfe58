"""Least-Stale, after SpecMD (arXiv 2602.03921), as we read it.

An expert is stale when it was not used in the current forward pass. Stale experts go first: those of the
layer whose turn comes last (just behind the current one), first in first out. Fresh experts of this pass go
last, in the same order. With per-layer shares all candidates are stale and of one layer, so that first in
first out remains."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.kernels import entries as loops
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.residency import GLOBAL


class LeastStaleState(NamedTuple):
    """Insertion order and the pass of the last use."""

    score: NDArray[np.float64]  # [L, E] made for each victim: pass, distance of the layer, insertion
    inserted: NDArray[np.float64]  # [L, E] step of the pool when the expert came in
    used: NDArray[np.int64]  # [L, E] access of its layer with the last request


def record(st, res, layer, ids, n):
    for i in range(n):
        if res.slot_of[layer, ids[i]] < 0:
            st.inserted[layer, ids[i]] = res.step[0]
        st.used[layer, ids[i]] = res.accesses[layer]
    if res.partition[0] == GLOBAL:
        n_layers = res.used.shape[0]
        for m in range(n_layers):
            ahead = (m - layer + n_layers) % n_layers  # 0: now, 1: next, ... n_layers - 1: just behind
            for i in range(res.used[m]):
                e = res.members[m, i]
                # Layers ahead were last served in the pass before; what they used then is stale by now.
                fresh = 1.0 if m <= layer and st.used[m, e] == res.accesses[m] else 0.0
                st.score[m, e] = fresh * 1e18 - ahead * 1e14 + st.inserted[m, e]


def victim(st, res, layer, g):
    if layer >= 0:
        return loops.lowest(st.inserted, res, layer, g)
    return loops.lowest(st.score, res, layer, g)


class LeastStale(EvictionPolicy):
    """Evicts stale before fresh, far before near, first in first out."""

    name = "least-stale"
    kernels = loops.compiled(LeastStaleState, record, victim)

    def make_state(self, n_layers: int, n_experts: int) -> LeastStaleState:
        shape = (n_layers, n_experts)
        return LeastStaleState(np.zeros(shape), np.zeros(shape), np.zeros(shape, np.int64))
