"""Least frequent and recent: requests of this sequence over the steps since the last one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.kernels import entries as loops
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.saved import Limits


class LfruState(NamedTuple):
    """Counts, recency, and their quotient as of the layer's last step."""

    score: NDArray[np.float64]  # [L, E] (count + 1) / (age + 1)
    counts: NDArray[np.float64]  # [L, E] requests since the sequence began
    last: NDArray[np.int64]  # [L, E] access of the layer with the last request


def record(st, res, layer, ids, n):
    now = res.accesses[layer]
    for i in range(n):
        st.counts[layer, ids[i]] += 1.0
        st.last[layer, ids[i]] = now
    for i in range(res.used[layer]):  # only residents can be victims
        e = res.members[layer, i]
        st.score[layer, e] = (st.counts[layer, e] + 1.0) / (now - st.last[layer, e] + 1.0)
    for i in range(n):
        st.score[layer, ids[i]] = st.counts[layer, ids[i]] + 1.0


def victim(st, res, layer, g):
    return loops.lowest(st.score, res, layer, g)


def begin(st):
    st.counts[:] = 0.0


class Lfru(EvictionPolicy):
    """Evicts the smallest (count + 1) / (age + 1): both seldom and long ago."""

    name = "lfru"
    suggested = True
    kernels = loops.compiled(LfruState, record, victim, begin=begin)

    def make_state(self, n_layers: int, n_experts: int) -> LfruState:
        shape = (n_layers, n_experts)
        return LfruState(np.zeros(shape), np.zeros(shape), np.zeros(shape, np.int64))

    def limits(self) -> dict[str, Limits]:
        return {"last": (0, self.residency.accesses[:, None])}
