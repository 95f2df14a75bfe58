"""Adaptive replacement cache (Megiddo and Modha, FAST 2003), one per layer, or one per size group if global.

T1 holds what was requested once, T2 what was requested again; B1 and B2 remember what left them ("ghosts"),
and a request for a ghost shifts the target size p of T1. Several experts are requested at once: each is
treated in turn, and pinned ones are passed over, in the other list if need be."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.kernels import entries as loops
from flashmoe.cache.kernels.slots import lean
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.residency import GLOBAL

NOWHERE, T1, T2, B1, B2 = 0, 1, 2, 3, 4


class ArcState(NamedTuple):
    """Which list each expert is on, and since when."""

    where: NDArray[np.uint8]  # [L, E] NOWHERE, T1, T2, B1, B2
    stamp: NDArray[np.float64]  # [L, E] order within a list
    target: NDArray[np.float64]  # [L] p of the layer (global: of the group's first layer)
    ghost: NDArray[np.uint8]  # [L] 1 if this access asked for a ghost of B2
    clock: NDArray[np.float64]  # [1]


@lean
def span(res, layer):
    """(first, last + 1, capacity) of the layers that share lists with `layer`; filter by group inside."""
    if res.partition[0] == GLOBAL:
        g = res.group[layer]
        first = 0
        while res.group[first] != g:
            first += 1
        return first, res.used.shape[0], res.group_start[g + 1] - res.group_start[g]
    return layer, layer + 1, max(res.quota[layer], res.used[layer])


@lean
def size(st, res, layer, kind):
    """Length of a list (residents only for T1 and T2)."""
    first, last, _ = span(res, layer)
    n = 0
    for m in range(first, last):
        if res.group[m] == res.group[layer]:
            for e in range(st.where.shape[1]):
                if st.where[m, e] == kind and (kind >= B1 or res.slot_of[m, e] >= 0):
                    n += 1
    return n


@lean
def forget_oldest(st, res, layer, kind):
    """Drop the oldest ghost of a list."""
    first, last, _ = span(res, layer)
    oldest = np.inf
    at, expert = -1, -1
    for m in range(first, last):
        if res.group[m] == res.group[layer]:
            for e in range(st.where.shape[1]):
                if st.where[m, e] == kind and st.stamp[m, e] < oldest:
                    oldest, at, expert = st.stamp[m, e], m, e
    if at >= 0:
        st.where[at, expert] = NOWHERE


@lean
def oldest_resident(st, res, layer, kind):
    """Slot of the least recent evictable expert of T1 or T2, or -1."""
    first, last, _ = span(res, layer)
    oldest = np.inf
    best = -1
    for m in range(first, last):
        if res.group[m] == res.group[layer]:
            for i in range(res.used[m]):
                e = res.members[m, i]
                if (
                    st.where[m, e] == kind
                    and st.stamp[m, e] < oldest
                    and loops.evictable(res, res.slot_of[m, e])
                ):
                    oldest, best = st.stamp[m, e], res.slot_of[m, e]
    return best


def record(st, res, layer, ids, n):
    first, _, capacity = span(res, layer)
    st.ghost[first] = 0
    for i in range(n):
        e = ids[i]
        st.clock[0] += 1.0
        st.stamp[layer, e] = st.clock[0]
        if res.slot_of[layer, e] >= 0:
            st.where[layer, e] = (
                T2 if st.where[layer, e] != NOWHERE else T1
            )  # a prefetch enters T1 on first use
        elif st.where[layer, e] == B1:
            more = max(1.0, size(st, res, layer, B2) / size(st, res, layer, B1))
            st.target[first] = min(float(capacity), st.target[first] + more)
            st.where[layer, e] = T2
        elif st.where[layer, e] == B2:
            less = max(1.0, size(st, res, layer, B1) / size(st, res, layer, B2))
            st.target[first] = max(0.0, st.target[first] - less)
            st.where[layer, e] = T2
            st.ghost[first] = 1
        else:
            recent = size(st, res, layer, T1) + size(st, res, layer, B1)
            if recent >= capacity:
                forget_oldest(st, res, layer, B1)
            elif recent + size(st, res, layer, T2) + size(st, res, layer, B2) >= 2 * capacity:
                forget_oldest(st, res, layer, B2)
            st.where[layer, e] = T1


def victim(st, res, layer, g):
    home = layer
    if layer < 0:
        home = 0
        while res.group[home] != g:
            home += 1
    first, _, capacity = span(res, home)
    once = size(st, res, home, T1)
    slot = -1
    if once > 0 and (once > st.target[first] or (st.ghost[first] == 1 and once == st.target[first])):
        slot = oldest_resident(st, res, home, T1)
    if slot < 0:
        slot = oldest_resident(st, res, home, T2)
    if slot < 0:
        slot = oldest_resident(st, res, home, T1)
    if slot < 0:  # resident from a warm start, never requested since
        slot = oldest_resident(st, res, home, NOWHERE)
    return slot if slot >= 0 else loops.lowest(st.stamp, res, layer, g)


def evicted(st, res, layer, expert):
    _, _, capacity = span(res, layer)
    st.clock[0] += 1.0
    st.stamp[layer, expert] = st.clock[0]
    if st.where[layer, expert] == T1 and size(st, res, layer, T1) + size(st, res, layer, B1) <= capacity:
        st.where[layer, expert] = B1
    elif st.where[layer, expert] == T2:
        st.where[layer, expert] = B2
    else:
        st.where[layer, expert] = NOWHERE


class Arc(EvictionPolicy):
    """Adaptive replacement cache (FAST 2003)."""

    name = "arc"
    kernels = loops.compiled(ArcState, record, victim, evicted)

    def make_state(self, n_layers: int, n_experts: int) -> ArcState:
        shape = (n_layers, n_experts)
        return ArcState(
            where=np.zeros(shape, np.uint8),
            stamp=np.zeros(shape),
            target=np.zeros(n_layers),
            ghost=np.zeros(n_layers, np.uint8),
            clock=np.zeros(1),
        )
