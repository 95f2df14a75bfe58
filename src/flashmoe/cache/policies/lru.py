"""Least recently used: evict the expert whose last request is longest ago."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from flashmoe.cache.policies import kernels as loops
from flashmoe.cache.policies.base import EvictionPolicy, Kernels


class LruState(NamedTuple):
    """Recency, over the whole session."""

    last: NDArray[np.float64]  # [L, E] step of the last request, 0 if never


def record(st, res, layer, ids, n):
    for i in range(n):
        st.last[layer, ids[i]] = res.step[0]


def victim(st, res, layer, g):
    return loops.lowest(st.last, res, layer, g)


def evicted(st, res, layer, expert):
    pass


def begin(st):
    pass


loops.rules(LruState, record, victim, evicted, begin)


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


class Lru(EvictionPolicy):
    """Least recently used, the baseline of every comparison."""

    name = "lru"
    kernels = Kernels(access, room, release, replay, start)

    def make_state(self, n_layers: int, n_experts: int) -> LruState:
        """See EvictionPolicy."""
        return LruState(last=np.zeros((n_layers, n_experts)))
