"""MoE-Infinity (arXiv 2401.14361): evict by the activation matrix of the most similar past sequence.

The expert activation matrix (EAM) of a sequence counts requests [L, E]. A collection keeps those of past
sequences. At each step the current EAM is matched against the collection by cosine; the nearest one predicts
the rest of the sequence, and the victim is the resident with the smallest (p[layer, e] / sum of p[layer] +
eps) * (1 - layer / L)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.kernels import entries as loops
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.saved import Limits

EPSILON = 1e-4


class MoEInfinityState(NamedTuple):
    """The current EAM, the collection, and the scores that the nearest one gives."""

    score: NDArray[np.float64]  # [L, E]
    eam: NDArray[np.float64]  # [L, E] requests since the sequence began
    past: NDArray[np.float64]  # [P, L, E] collection, each of unit length
    filled: NDArray[np.int64]  # [2] entries in the collection, next to overwrite
    dot: NDArray[np.float64]  # [P] inner products of the current EAM with the collection, kept up to date
    nearest: NDArray[np.int64]  # [1] entry that the scores come from, -1 none


def record(st, res, layer, ids, n):
    for i in range(n):
        st.eam[layer, ids[i]] += 1.0
        for p in range(st.filled[0]):
            st.dot[p] += st.past[p, layer, ids[i]]
    if layer == 0 and st.filled[0] > 0:  # once a token
        best = 0
        for p in range(1, st.filled[0]):
            if st.dot[p] > st.dot[best]:
                best = p
        st.nearest[0] = best
    total = 0.0
    n_experts = st.eam.shape[1]
    nearest = st.nearest[0]
    for e in range(n_experts):
        total += st.past[nearest, layer, e] if nearest >= 0 else st.eam[layer, e]
    share = 1.0 - layer / st.eam.shape[0]
    for e in range(n_experts):
        p = st.past[nearest, layer, e] if nearest >= 0 else st.eam[layer, e]
        st.score[layer, e] = (p / max(total, 1e-12) + EPSILON) * share


def victim(st, res, layer, g):
    return loops.lowest(st.score, res, layer, g)


def begin(st):
    norm = 0.0
    for layer in range(st.eam.shape[0]):
        for e in range(st.eam.shape[1]):
            norm += st.eam[layer, e] * st.eam[layer, e]
    if norm > 0.0:  # the sequence that ended joins the collection, in place of the oldest if full
        at = st.filled[1]
        for layer in range(st.eam.shape[0]):
            for e in range(st.eam.shape[1]):
                st.past[at, layer, e] = st.eam[layer, e] / math.sqrt(norm)
        st.filled[0] = max(st.filled[0], at + 1)
        st.filled[1] = (at + 1) % st.past.shape[0]
    st.eam[:] = 0.0
    st.dot[:] = 0.0


def limits(size: int) -> dict[str, Limits]:
    """Of the arrays of a state with a collection of `size` that are used as indices."""
    return {"filled": (0, np.array([size, size - 1])), "nearest": (-1, size - 1)}


class MoEInfinity(EvictionPolicy):
    """Evicts by the activation matrix of the most similar past sequence.

    size: entries of the collection (the paper: about 120).
    """

    name = "moe-infinity"
    kernels = loops.compiled(MoEInfinityState, record, victim, begin=begin)

    def __init__(self, size: int = 120) -> None:
        super().__init__()
        self.size = size

    def make_state(self, n_layers: int, n_experts: int) -> MoEInfinityState:
        shape = (n_layers, n_experts)
        return MoEInfinityState(
            score=np.zeros(shape),
            eam=np.zeros(shape),
            past=np.zeros((self.size, *shape)),
            filled=np.zeros(2, np.int64),
            dot=np.zeros(self.size),
            nearest=np.full(1, -1, np.int64),
        )

    def limits(self) -> dict[str, Limits]:
        return limits(self.size)
