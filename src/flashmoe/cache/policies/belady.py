"""Belady's oracle (MIN): evict the expert whose next request is farthest away. Simulator only.

Optimal for equal shares, where no step needs more experts than a layer's share; the bound that other policies
are measured against."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.kernels import entries as loops
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.common.kept import kept
from flashmoe.errors import PolicyError


class BeladyState(NamedTuple):
    """All requests of the trace, and how far it has come."""

    score: NDArray[np.float64]  # [L, E] minus the time of the next request, -inf if none
    uses: NDArray[np.int64]  # [U] times (token * L + layer) of the requests of (layer, expert), ascending
    begin: NDArray[np.int64]  # [L * E + 1] where each expert's uses lie
    next: NDArray[np.int64]  # [L, E] index of the current use


def record(st, res, layer, ids, n):
    n_experts = st.score.shape[1]
    for i in range(n):
        e = ids[i]
        st.next[layer, e] += 1
        i_next = st.next[layer, e]
        st.score[layer, e] = -st.uses[i_next] if i_next < st.begin[layer * n_experts + e + 1] else -np.inf


def victim(st, res, layer, g):
    return loops.lowest(st.score, res, layer, g)


@kept()
def requests_of(ids, requests, group, n_experts, uses, begin):
    """Fill uses and begin (see BeladyState) from ids [T, L, k], requests [G, T] (see EvictionPolicy.requests) and the
    size group of each layer [L]; returns the number of uses."""
    n_layers = ids.shape[1]
    seen = np.empty((n_layers, n_experts), np.int64)
    fill = np.empty((n_layers, n_experts), np.int64)
    for turn in range(2):  # count, then write
        seen[:] = -1
        if turn == 0:
            begin[:] = 0
        else:
            for i in range(1, len(begin)):
                begin[i] += begin[i - 1]
            fill[:] = begin[:-1].copy().reshape(n_layers, n_experts)
        for t in range(ids.shape[0]):
            for layer in range(n_layers):
                s = requests[group[layer], t]
                for j in range(ids.shape[2]):
                    e = ids[t, layer, j]
                    if e < 0 or seen[layer, e] == s:
                        continue
                    seen[layer, e] = s
                    if turn == 0:
                        begin[layer * n_experts + e + 1] += 1
                    else:
                        uses[fill[layer, e]] = s * n_layers + layer
                        fill[layer, e] += 1
    return begin[-1]


class Belady(EvictionPolicy):
    """Evicts the farthest next use: the oracle, on traces only. It has `replay`, no `access`."""

    name = "belady"
    kernels = loops.compiled(BeladyState, record, victim)
    oracle = True

    def make_state(self, n_layers: int, n_experts: int) -> BeladyState:
        return BeladyState(
            score=np.full((n_layers, n_experts), -np.inf),
            uses=np.zeros(0, np.int64),
            begin=np.zeros(n_layers * n_experts + 1, np.int64),
            next=np.full((n_layers, n_experts), -1, np.int64),
        )

    def access(self, *_: object) -> int:
        """Raises PolicyError: the future is known only in a replay."""
        raise PolicyError("policy 'belady' knows only recorded traces: use it with `flashmoe simulate`")

    def prepare(self, ids: NDArray[np.int16], requests: NDArray[np.int64]) -> None:
        """Read the future from ids [T, L, k], requests [G, T]."""
        n_layers, n_experts = self.residency.n_layers, self.residency.n_experts
        uses = np.zeros(ids.size, np.int64)
        begin = np.zeros(n_layers * n_experts + 1, np.int64)
        n = requests_of(ids, requests, self.residency.group, n_experts, uses, begin)
        following = begin[:-1].reshape(n_layers, n_experts).copy()  # the first request moves on to the second
        score = np.full((n_layers, n_experts), -np.inf)
        self._state = BeladyState(score, uses[:n].copy(), begin, following)
