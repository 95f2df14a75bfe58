"""The policy of the FlashMoE paper (arXiv 2601.17063): a small network per layer ranks the experts.

Inputs, for all E experts of the layer, since the sequence began: recency 1 / (age + 1) + 1e-6, age in steps
since the last use, infinite if never; frequency count / (max count + 1e-6). In this order: recency of all
experts, then frequency of all. 2E -> 64 -> 64 -> E, SiLU, absolute value at the end: the predicted time to
the next use. Largest goes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.kernels import entries as loops
from flashmoe.cache.kernels.slots import allocating, lean, loose
from flashmoe.cache.policies.learned import LearnedPolicy, PolicyFile
from flashmoe.cache.residency import GLOBAL
from flashmoe.cache.saved import Limits
from flashmoe.errors import PolicyError

HIDDEN = 64
FEATURES = ["recency[0:E]", "frequency[0:E]"]
EPSILON = 1e-6


class FlashmoeState(NamedTuple):
    """History since the sequence began, the networks, and what they last said."""

    score: NDArray[np.float32]  # [L, E] minus the predicted time to the next use
    scored: NDArray[np.int64]  # [L] access that the scores are of
    last: NDArray[np.int64]  # [L, E] access of the layer with the last request, -1 if none in this sequence
    counts: NDArray[np.float32]  # type: ignore[assignment]  # [L, E] requests in this sequence
    w1: NDArray[np.float32]  # [L, 2E, 64]
    b1: NDArray[np.float32]  # [L, 64]
    w2: NDArray[np.float32]  # [L, 64, 64]
    b2: NDArray[np.float32]  # [L, 64]
    w3: NDArray[np.float32]  # [L, 64, E]
    b3: NDArray[np.float32]  # [L, E]


@lean
def observe(last, count, layer, ids, n, now):
    """Note the requests ids[:n] of a layer at its access `now`. Shared by runtime and training."""
    for i in range(n):
        last[layer, ids[i]] = now
        count[layer, ids[i]] += np.float32(1.0)


@lean
def features(last, count, layer, now, x):
    """Fill x float32 [2E] with the inputs of the layer's network. Shared by runtime and training."""
    n_experts = last.shape[1]
    most = np.float32(0.0)
    for e in range(n_experts):
        most = max(most, count[layer, e])
    for e in range(n_experts):
        seen = last[layer, e]
        x[e] = (1.0 / (now - seen + 1.0) if seen >= 0 else 0.0) + EPSILON
        x[n_experts + e] = count[layer, e] / (most + EPSILON)


@loose
def dense(x, w, b, out):
    """out = x @ w + b for float32 [i], [i, j], [j]."""
    for j in range(out.shape[0]):
        out[j] = b[j]
    for i in range(x.shape[0]):
        a = x[i]
        for j in range(out.shape[0]):
            out[j] += a * w[i, j]


@loose
def silu(x):
    """x / (1 + exp(-x)), in place."""
    for i in range(x.shape[0]):
        x[i] = x[i] / (np.float32(1.0) + math.exp(-x[i]))


@allocating
def infer(st, layer, now):
    """Run the layer's network and write its scores."""
    x = np.empty(2 * st.last.shape[1], np.float32)
    features(st.last, st.counts, layer, now, x)
    h1 = np.empty(HIDDEN, np.float32)
    dense(x, st.w1[layer], st.b1[layer], h1)
    silu(h1)
    h2 = np.empty(HIDDEN, np.float32)
    dense(h1, st.w2[layer], st.b2[layer], h2)
    silu(h2)
    out = st.score[layer]
    dense(h2, st.w3[layer], st.b3[layer], out)
    for e in range(out.shape[0]):
        out[e] = -abs(out[e])
    st.scored[layer] = now


def record(st, res, layer, ids, n):
    observe(st.last, st.counts, layer, ids, n, res.accesses[layer])
    if res.partition[0] == GLOBAL:
        infer(st, layer, res.accesses[layer])


def victim(st, res, layer, g):
    if layer >= 0 and st.scored[layer] != res.accesses[layer]:
        infer(st, layer, res.accesses[layer])
    return loops.lowest(st.score, res, layer, g)


def begin(st):
    st.last[:] = -1
    st.counts[:] = 0.0


class Flashmoe(LearnedPolicy):
    """Evicts what the paper's network expects back last, from a trained file."""

    name = "flashmoe"
    kernels = loops.compiled(FlashmoeState, record, victim, begin=begin)

    def __init__(self, file: str | Path | None = None, trained: PolicyFile | None = None) -> None:
        super().__init__(file, trained)
        if self.trained.features != FEATURES:
            raise PolicyError(
                f"the policy file was trained with features {self.trained.features}, not {FEATURES}"
            )
        n_layers, e = self.trained.n_layers, self.trained.n_experts
        shapes = {"w1": (2 * e, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, HIDDEN), "b2": (HIDDEN,)}
        shapes |= {"w3": (HIDDEN, e), "b3": (e,)}
        self.weights = {name: self.trained.array(name, n_layers, *shape) for name, shape in shapes.items()}
        self.fixed = frozenset(self.weights)

    def make_state(self, n_layers: int, n_experts: int) -> FlashmoeState:
        self.trained.check_shape(n_layers, n_experts)
        shape = (n_layers, n_experts)
        return FlashmoeState(
            score=np.zeros(shape, np.float32),
            scored=np.full(n_layers, -1, np.int64),
            last=np.full(shape, -1, np.int64),
            counts=np.zeros(shape, np.float32),
            **self.weights,
        )

    def limits(self) -> dict[str, Limits]:
        return {"last": (-1, self.residency.accesses[:, None]), "counts": (0.0, 1e12)}
