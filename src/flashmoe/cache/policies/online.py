"""Learns as it goes: a linear model per layer of what is used soon, with no file and no training beforehand.

The score of an expert is its share of requests in the coming steps, the nearest counted most, as a linear model
predicts it:

    score[e] = BASE * average[e] + sum_d trace_d[e] + sum_j sum_f weight_j[f, e]

- average: the moving average of the expert's requests that `lfu-aged` uses. With all weights zero, as at the start,
  both policies evict the same expert.
- trace_d: what the layer's own experts of this and earlier steps say, faded by DECAYS[d] per step. An expert f that is
  requested adds weight_d[f, e] to the trace of every e, so that a step costs k rows of weights, not E.
- weight_j[f, e], without memory: what the experts f say that the BEHIND layers before this one have just used.

The weights are learnt by least squares on the discounted use in the AHEAD steps after a request, which is known AHEAD
steps later: for BATCH steps at a time, newest first, so that the error of each step is passed back along the traces at
the cost of one row. A row's step shrinks with the root of the squared errors that it has seen (AdaGrad,
Duchi, Hazan, Singer: Adaptive Subgradient Methods, JMLR 2011).

The idea is that of the learned eviction of FlashMoE (arXiv 2601.17063), without its network: which experts go together
is learnt, and it differs from model to model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.kernels import entries as loops
from flashmoe.cache.kernels.slots import lean
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.saved import Limits, load_state
from flashmoe.errors import PolicyError

AVERAGE_DECAY = np.float32(0.97)
BASE = np.float32(0.4)
DECAYS = (0.6, 0.9)
BEHIND = 3  # layers
AHEAD = 16  # steps
BATCH = 24  # steps
HISTORY = AHEAD + BATCH + 2  # the layers behind may be one step ahead
DISCOUNT = np.float32(0.8)  # per step
TOTAL = np.float32(sum(0.8**i for i in range(AHEAD)))
RATE = np.float32(0.003)
CARE = np.float32(1e-3)  # a row's squared errors before the first
OTHERS = np.float32(0.3)  # scale of the inputs from other layers
MOST = 32  # experts of one request that count
LARGEST = 64 << 20  # bytes of weights; beyond them, fewer inputs


class OnlineState(NamedTuple):
    """Weights and history. J = D + B inputs: D decays, B layers behind; H steps of history."""

    score: NDArray[np.float32]  # [L, E]
    average: NDArray[np.float32]  # [L, E]
    trace: NDArray[np.float32]  # [L, D, E]
    weight: NDArray[np.float32]  # [L, J, E, E] of what was used, for what may be used
    squares: NDArray[np.float32]  # [L, J, E] squared errors that a row has seen
    decay: NDArray[np.float32]  # [D]
    steps: NDArray[np.int64]  # [L] requests of the layer
    used: NDArray[np.int32]  # [L, H, MOST] experts of the last requests
    n_used: NDArray[np.int32]  # [L, H]
    behind: NDArray[np.int64]  # [L, H, B] step of the layer behind that was its newest at the request
    predicted: NDArray[np.float32]  # [L, H, E]
    error: NDArray[np.float32]  # [BATCH, E] scratch
    row: NDArray[np.float32]  # [E] scratch


@lean
def layer_behind(st, layer, j):
    """The layer whose request came j + 1 before this layer's; layers of the step before where there is none."""
    return (layer - 1 - j) % st.steps.shape[0]


@lean
def note(st, layer, ids, n):
    """Write the request of the experts ids[:n] into the history; its step."""
    now = st.steps[layer]
    at = now % HISTORY
    count = min(n, MOST)
    st.n_used[layer, at] = count
    for i in range(count):
        st.used[layer, at, i] = ids[i]
    for j in range(st.behind.shape[2]):
        st.behind[layer, at, j] = st.steps[layer_behind(st, layer, j)] - 1
    st.steps[layer] = now + 1
    return now


@lean
def predict(st, layer, now):
    """Bring traces and scores of a layer up to date with its step `now`."""
    n_experts = st.score.shape[1]
    at = now % HISTORY
    score, average = st.score[layer], st.average[layer]
    gain = np.float32(1.0) - AVERAGE_DECAY
    for e in range(n_experts):
        average[e] *= AVERAGE_DECAY
    for i in range(st.n_used[layer, at]):
        average[st.used[layer, at, i]] += gain
    for e in range(n_experts):
        score[e] = BASE * average[e]
    n_decays = st.decay.shape[0]
    for d in range(n_decays):
        trace, keep = st.trace[layer, d], st.decay[d]
        for e in range(n_experts):
            trace[e] *= keep
        for i in range(st.n_used[layer, at]):
            weight = st.weight[layer, d, st.used[layer, at, i]]
            for e in range(n_experts):
                trace[e] += (np.float32(1.0) - keep) * weight[e]
        for e in range(n_experts):
            score[e] += trace[e]
    for j in range(st.behind.shape[2]):
        other, step = layer_behind(st, layer, j), st.behind[layer, at, j]
        if step < 0:
            continue
        for i in range(st.n_used[other, step % HISTORY]):
            weight = st.weight[layer, n_decays + j, st.used[other, step % HISTORY, i]]
            for e in range(n_experts):
                score[e] += OTHERS * weight[e]
    predicted = st.predicted[layer, at]
    for e in range(n_experts):
        predicted[e] = score[e]


@lean
def find_errors(st, layer, newest):
    """Prediction less discounted use for the BATCH steps up to `newest`, newest first, into st.error."""
    n_experts = st.score.shape[1]
    use = st.row
    for e in range(n_experts):
        use[e] = np.float32(0.0)
    share = np.float32(1.0) / TOTAL
    for ahead in range(1, AHEAD + 1):
        at = (newest + ahead) % HISTORY
        for i in range(st.n_used[layer, at]):
            use[st.used[layer, at, i]] += share
        share *= DISCOUNT
    for b in range(BATCH):
        at, last = (newest - b) % HISTORY, (newest - b + AHEAD) % HISTORY
        predicted, error = st.predicted[layer, at], st.error[b]
        for e in range(n_experts):
            error[e] = predicted[e] - use[e]
        for e in range(n_experts):
            use[e] *= DISCOUNT
        for i in range(st.n_used[layer, at]):
            use[st.used[layer, at, i]] += np.float32(1.0) / TOTAL
        for i in range(st.n_used[layer, last]):
            use[st.used[layer, last, i]] -= share


@lean
def correct(st, layer, j, scale, gradient, source, at):
    """Move the rows of weights of input j for the experts that layer `source` used, against a gradient [E]."""
    n_experts = gradient.shape[0]
    total = np.float32(0.0)
    for e in range(n_experts):
        total += gradient[e] * gradient[e]
    total *= scale * scale / np.float32(n_experts)
    for i in range(st.n_used[source, at]):
        f = st.used[source, at, i]
        st.squares[layer, j, f] += total
        step = RATE * scale / np.float32(math.sqrt(st.squares[layer, j, f]))
        weight = st.weight[layer, j, f]
        for e in range(n_experts):
            weight[e] -= step * gradient[e]


@lean
def learn(st, layer, newest):
    """Learn from the BATCH steps of a layer up to `newest`, after which AHEAD more are known."""
    find_errors(st, layer, newest)
    n_decays, n_experts = st.decay.shape[0], st.score.shape[1]
    for d in range(n_decays):
        passed = st.row
        for e in range(n_experts):
            passed[e] = np.float32(0.0)
        for b in range(BATCH):
            error = st.error[b]
            for e in range(n_experts):
                passed[e] = error[e] + st.decay[d] * passed[e]
            correct(st, layer, d, np.float32(1.0) - st.decay[d], passed, layer, (newest - b) % HISTORY)
    for j in range(st.behind.shape[2]):
        other = layer_behind(st, layer, j)
        for b in range(BATCH):
            step = st.behind[layer, (newest - b) % HISTORY, j]
            if step >= 0 and st.steps[other] - step <= HISTORY:
                correct(st, layer, n_decays + j, OTHERS, st.error[b], other, step % HISTORY)


@lean
def follow(st, layer, ids, n):
    """One request of a layer: predict, and once in BATCH steps learn; other layers do so in other steps."""
    now = note(st, layer, ids, n)
    predict(st, layer, now)
    if now >= AHEAD + BATCH and (now + layer) % BATCH == 0:
        learn(st, layer, now - AHEAD)


def record(st, res, layer, ids, n):
    follow(st, layer, ids, n)


def victim(st, res, layer, g):
    return loops.lowest(st.score, res, layer, g)


def inputs(n_layers: int, n_experts: int) -> tuple[int, int]:
    """How many decays and layers behind fit into LARGEST bytes of weights; (0, 0) where not even one does."""
    most = LARGEST // (n_layers * n_experts * n_experts * np.dtype(np.float32).itemsize)
    decays, behind = len(DECAYS), min(BEHIND, n_layers - 1)
    if most < decays + behind:
        decays, behind = min(1, most), min(1, most - 1, n_layers - 1)
    return decays, max(behind, 0)


def without_weights(state: OnlineState) -> OnlineState:
    """What `victim` reads: nearly all of the memory is weights."""
    return state._replace(weight=np.empty((0, 0, 0, 0), np.float32))


def make_state(n_layers: int, n_experts: int) -> OnlineState:
    """As at the start: no weights."""
    decays, behind = inputs(n_layers, n_experts)
    shape = (n_layers, n_experts)
    return OnlineState(
        score=np.zeros(shape, np.float32),
        average=np.zeros(shape, np.float32),
        trace=np.zeros((n_layers, decays, n_experts), np.float32),
        weight=np.zeros((n_layers, decays + behind, n_experts, n_experts), np.float32),
        squares=np.full((n_layers, decays + behind, n_experts), CARE, np.float32),
        decay=np.array(DECAYS[-decays:] if decays else (), np.float32),
        steps=np.zeros(n_layers, np.int64),
        used=np.zeros((n_layers, HISTORY, MOST), np.int32),
        n_used=np.zeros((n_layers, HISTORY), np.int32),
        behind=np.full((n_layers, HISTORY, behind), -1, np.int64),
        predicted=np.zeros((n_layers, HISTORY, n_experts), np.float32),
        error=np.zeros((BATCH, n_experts), np.float32),
        row=np.zeros(n_experts, np.float32),
    )


SCRATCH = frozenset({"error", "row", "decay"})


def limits(n_experts: int) -> dict[str, Limits]:
    """Of the arrays that are used as indices, and of those that are divided by."""
    return {
        "steps": (0, 1 << 60),
        "used": (0, n_experts - 1),
        "n_used": (0, MOST),
        "behind": (-1, 1 << 60),
        "squares": (float(CARE), 1e18),
    }


#: What another session goes on from.
LEARNT = ("weight", "squares")


class Online(EvictionPolicy):
    """Evicts the lowest use soon, by a linear model that learns as it runs."""

    name = "online"
    learns = True
    kernels = loops.compiled(OnlineState, record, victim)
    fixed = SCRATCH

    def __init__(self) -> None:
        super().__init__()
        self._recalled: Mapping[str, NDArray[Any]] = {}

    def make_state(self, n_layers: int, n_experts: int) -> OnlineState:
        state = make_state(n_layers, n_experts)
        own = {name: getattr(state, name) for name in LEARNT}
        if self._recalled and (wrong := load_state(own, self._recalled, limits(n_experts))):
            raise PolicyError(f"what {self.name!r} has learnt does not fit ({wrong})")
        return state

    def learnt(self) -> dict[str, NDArray[np.float32]]:
        return {name: getattr(self._state, name).copy() for name in LEARNT}

    def recall(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self._recalled = arrays

    def _for_victims(self) -> OnlineState:
        return without_weights(self._state)

    def limits(self) -> dict[str, Limits]:
        return limits(self.residency.n_experts)
