"""Least frequent and recent: requests of this sequence over the steps since the last one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from flashmoe.cache.policies import kernels as loops
from flashmoe.cache.policies.base import EvictionPolicy, Kernels


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


def evicted(st, res, layer, expert):
    pass


def begin(st):
    st.counts[:] = 0.0


loops.rules(LfruState, record, victim, evicted, begin)


@njit(cache=True)
def access(st, res, layer, ids, slots_out, miss_expert, miss_slot):
    return loops.access_loop(st, res, layer, ids, slots_out, miss_expert, miss_slot)


@njit(cache=True)
def room(st, res, layer):
    return loops.room_loop(st, res, layer)


@njit(cache=True)
def release(st, res, layer, expert):
    return loops.release_loop(st, res, layer, expert)


@njit(cache=True)
def replay(st, res, ids, first, starts, bits, requests, hits):
    return loops.replay_loop(st, res, ids, first, starts, bits, requests, hits)


@njit(cache=True)
def start(st):
    loops.begin(st)


class Lfru(EvictionPolicy):
    """Evict the smallest (count + 1) / (age + 1): both seldom and long ago."""

    name = "lfru"
    kernels = Kernels(access, room, release, replay, start)

    def make_state(self, n_layers: int, n_experts: int) -> LfruState:
        """See EvictionPolicy."""
        shape = (n_layers, n_experts)
        return LfruState(np.zeros(shape), np.zeros(shape), np.zeros(shape, np.int64))
