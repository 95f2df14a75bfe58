"""LeCaR (Vietri et al., HotStorage 2018): LRU or LFU, drawn by weights that regret moves.

What one of the two evicted is remembered; when it is requested again, the other one gains weight, the more
the shorter ago that was. Draws come from a generator in the state: the same trace gives the same hits."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.kernels import entries as loops
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.policies.lfu import COUNT
from flashmoe.cache.saved import Limits

LEARNING_RATE = 0.45
DISCOUNT = 0.005  # to the power 1 / capacity, per step


class LeCaRState(NamedTuple):
    """Recency, counts, what either policy evicted, and the weights."""

    last: NDArray[np.float64]  # [L, E] step of the last request
    key: NDArray[np.float64]  # [L, E] count * 2^36 + last
    evicted_by: NDArray[np.uint8]  # [L, E] 0 none, 1 LRU, 2 LFU
    evicted_at: NDArray[np.int64]  # [L, E] access of the layer
    weight: NDArray[np.float64]  # [L] of LRU; LFU has 1 - weight
    choice: NDArray[np.uint8]  # [1] which policy chose last
    random: NDArray[np.uint64]  # [1] xorshift64 state


def record(st, res, layer, ids, n):
    for i in range(n):
        e = ids[i]
        if res.slot_of[layer, e] < 0 and st.evicted_by[layer, e] > 0:
            ago = res.accesses[layer] - st.evicted_at[layer, e]
            regret = math.exp(math.log(DISCOUNT) * ago / max(1, res.quota[layer]))
            lru, lfu = st.weight[layer], 1.0 - st.weight[layer]
            if st.evicted_by[layer, e] == 1:
                lfu *= math.exp(LEARNING_RATE * regret)
            else:
                lru *= math.exp(LEARNING_RATE * regret)
            st.weight[layer] = min(0.99, max(0.01, lru / (lru + lfu)))
        st.evicted_by[layer, e] = 0
        count = math.floor(st.key[layer, e] / COUNT) + 1.0
        st.last[layer, e] = res.step[0]
        st.key[layer, e] = count * COUNT + res.step[0]


def victim(st, res, layer, g):
    x = st.random[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    st.random[0] = x
    home = layer
    if layer < 0:
        home = 0
        while res.group[home] != g:
            home += 1
    if (x >> np.uint64(11)) * (1.0 / 9007199254740992.0) < st.weight[home]:
        st.choice[0] = 1
        return loops.lowest(st.last, res, layer, g)
    st.choice[0] = 2
    return loops.lowest(st.key, res, layer, g)


def evicted(st, res, layer, expert):
    st.evicted_by[layer, expert] = st.choice[0]
    st.evicted_at[layer, expert] = res.accesses[layer]


def begin(st):
    for layer in range(st.key.shape[0]):
        for e in range(st.key.shape[1]):
            st.key[layer, e] = st.last[layer, e]  # counts are of the sequence


class LeCaR(EvictionPolicy):
    """LRU or LFU, drawn by weights that regret moves, per layer."""

    name = "lecar"
    suggested = True
    kernels = loops.compiled(LeCaRState, record, victim, evicted, begin)

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        self.seed = seed

    def make_state(self, n_layers: int, n_experts: int) -> LeCaRState:
        shape = (n_layers, n_experts)
        return LeCaRState(
            last=np.zeros(shape),
            key=np.zeros(shape),
            evicted_by=np.zeros(shape, np.uint8),
            evicted_at=np.zeros(shape, np.int64),
            weight=np.full(n_layers, 0.5),
            choice=np.ones(1, np.uint8),
            random=np.array([0x9E3779B97F4A7C15 ^ self.seed], np.uint64),
        )

    def limits(self) -> dict[str, Limits]:
        return {"weight": (0.01, 0.99), "evicted_at": (0, self.residency.accesses[:, None])}
