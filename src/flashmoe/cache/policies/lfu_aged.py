"""Frequency that fades: evict the expert with the lowest exponential moving average of its requests."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.kernels import entries as loops
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.residency import GLOBAL
from flashmoe.cache.saved import Limits
from flashmoe.errors import PolicyError


class LfuAgedState(NamedTuple):
    """Moving averages, stored so that only the requested experts change.

    A layer's averages all shrink by `decay` at each of its steps; instead, what is added grows by 1 / decay,
    and the layer is scaled back before numbers get large. Averages therefore compare within a layer at once,
    and across layers (global partition) by their logarithm with the scale taken off.
    """

    score: NDArray[
        np.float64
    ]  # [L, E] log of the average with the layer's growth taken off, -inf if never used
    average: NDArray[np.float64]  # [L, E] average * growth
    growth: NDArray[np.float64]  # [L] what one request adds now
    decay: NDArray[np.float64]  # [1]


def record(st, res, layer, ids, n):
    st.growth[layer] /= st.decay[0]
    if st.growth[layer] > 1e100:
        for e in range(st.average.shape[1]):
            st.average[layer, e] /= st.growth[layer]
        st.growth[layer] = 1.0
    for i in range(n):
        st.average[layer, ids[i]] += st.growth[layer]
    if res.partition[0] == GLOBAL:
        for e in range(st.average.shape[1]):
            st.score[layer, e] = st.average[layer, e] / st.growth[layer]


def victim(st, res, layer, g):
    if layer >= 0:
        return loops.lowest(st.average, res, layer, g)
    return loops.lowest(st.score, res, layer, g)


class LfuAged(EvictionPolicy):
    """Evicts the lowest exponential moving average of requests.

    decay: 0..1 per step of the layer; nearer to 1 remembers longer.
    """

    name = "lfu-aged"
    suggested = True
    kernels = loops.compiled(LfuAgedState, record, victim)
    fixed = frozenset({"decay"})

    def __init__(self, decay: float = 0.97) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise PolicyError(f"the decay of lfu-aged must lie between 0 and 1, got {decay}")
        self.decay = decay

    def make_state(self, n_layers: int, n_experts: int) -> LfuAgedState:
        shape = (n_layers, n_experts)
        return LfuAgedState(np.zeros(shape), np.zeros(shape), np.ones(n_layers), np.array([self.decay]))

    def limits(self) -> dict[str, Limits]:
        return {"growth": (1.0, 1e101), "average": (0.0, 1e120)}
