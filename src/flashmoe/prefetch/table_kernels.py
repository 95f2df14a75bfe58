"""The compiled loops of the predictor `table`."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import carray
from numpy.typing import NDArray

from flashmoe.common.compiled import float32_at, int32_at, layout, pinned
from flashmoe.common.kept import kept
from flashmoe.prefetch.base import AHEAD

#: Where each class (one for each distance of AHEAD) looks: d > 0: d layers behind the target, this token; d <= 0: -d
#: layers ahead of the target, the token before; NONE: nowhere.
NONE = 99
SOURCES = ((0, -3, -6, NONE), (1, 2, 3, 0), (2, 3, 4, 0), (4, 5, 6, 0))
MATRICES = 64 << 20  # most bytes of matrices: models of many experts use fewer sources
N_FEATURES = 5  # 1, log frequency, recent and very recent against it, token against it
RATES = (0.003, 0.03, 0.15)  # of the moving averages
UNIT = 4096  # matrices hold int16 of this fraction
# of the matrices: at the start, tokens until it falls by sqrt(2), least; half for class 0
STEP = (0.12, 400.0, 0.015)
FEATURE_STEP = 0.1
PRIOR = 0.5  # weight of the usual frequency against one occurrence of a token
PROBES = 8  # rows of the token table that a token may take
FULL = 255  # occurrences at which a row is halved
KIND = "TableState"


class TableState(NamedTuple):
    """Few arrays, since each costs time in every call. L layers, E experts, k per token, R rows, C
    classes of S sources."""

    average: NDArray[np.float32]  # [3, L, E] moving averages of being picked
    feature: NDArray[np.float32]  # [L, 5, E] as they are now
    weight: NDArray[np.float32]  # [2, C, L, 5] of the features; sums of squared gradients
    matrix: NDArray[np.int16]  # [C * S, L, E, E] in units of 1 / UNIT: [class and source, target, from, to]
    picked: NDArray[
        np.int32
    ]  # [2, L, k + 1] experts of this token and of the one before; their number at the end
    row: NDArray[np.int32]  # [2, R] token + 1 (0: free) and its occurrences
    counts: NDArray[np.uint8]  # [R, L, E] how often an expert served a token
    now: NDArray[np.int64]  # [3] row of the token, -1 none; its occurrences before; tokens so far


@kept()
def find(st, token):
    """Row of a token, which takes one where it has none: a free one, or that of the rarest of a few."""
    n_rows = st.row.shape[1]
    first = (token * 2654435761) % n_rows
    rarest = first
    for i in range(PROBES):
        r = (first + i) % n_rows
        if st.row[0, r] == token + 1:
            return r
        if st.row[0, r] == 0:
            rarest = r
            break
        if st.row[1, r] < st.row[1, rarest]:
            rarest = r
    if st.row[0, rarest] != 0:
        st.counts[rarest] = 0
    st.row[0, rarest] = token + 1
    st.row[1, rarest] = 0
    return rarest


@kept(fastmath=True)
def begin(st, token):
    """A step begins: the token's row, and what it says of each layer."""
    n_layers, _, n_experts = st.feature.shape
    k = st.picked.shape[2] - 1
    for m in range(n_layers):
        if st.picked[0, m, k] > 0:
            for j in range(k + 1):
                st.picked[1, m, j] = st.picked[0, m, j]
        st.picked[0, m, k] = 0
    st.now[0] = -1
    st.now[1] = 0
    if token >= 0:
        r = find(st, token)
        if st.row[1, r] == FULL:
            st.row[1, r] = FULL // 2
            for m in range(n_layers):
                for e in range(n_experts):
                    st.counts[r, m, e] >>= 1
        st.now[0] = r
        st.now[1] = st.row[1, r]
        st.row[1, r] += 1
    n = np.float32(st.now[1])
    if n == 0:
        for m in range(n_layers):
            st.feature[m, 4, :] = np.float32(0.0)
    else:
        never = np.float32(math.log(PRIOR / (n + PRIOR)))
        for m in range(n_layers):
            for e in range(n_experts):
                c = st.counts[st.now[0], m, e]
                if c == 0:
                    st.feature[m, 4, e] = never
                else:
                    usual = st.average[0, m, e] + np.float32(1e-3)
                    st.feature[m, 4, e] = math.log((c / usual + PRIOR) / (n + PRIOR))
    st.now[2] += 1


@kept()
def source(st, c, i, target):
    """(0 this token or 1 the one before, layer) of a source of a class; layer -1 where there is none."""
    d = SOURCES[c][i]
    if d == NONE or target - d < 0 or target - d >= st.picked.shape[1]:
        return 0, -1
    return (0 if d > 0 else 1), target - d


@kept(fastmath=True)
def rate(st, c, target, out):
    """Fill out [E] with the chances of a layer by one class."""
    n_experts = out.shape[0]
    k = st.picked.shape[2] - 1
    total = np.zeros(n_experts, np.int32)
    for i in range(st.matrix.shape[0] // len(AHEAD)):
        which, layer = source(st, c, i, target)
        if layer >= 0:
            for j in range(st.picked[which, layer, k]):
                row = st.matrix[
                    c * (st.matrix.shape[0] // len(AHEAD)) + i, target, st.picked[which, layer, j]
                ]
                for e in range(n_experts):
                    total[e] += row[e]
    w, x = st.weight[0, c, target], st.feature[target]
    for e in range(n_experts):
        z = total[e] * np.float32(1.0 / UNIT) + w[0]
        z += w[1] * x[1, e] + w[2] * x[2, e] + w[3] * x[3, e] + w[4] * x[4, e]
        z = min(max(z, np.float32(-20.0)), np.float32(20.0))
        out[e] = np.float32(1.0) / (np.float32(1.0) + math.exp(-z))


@kept()
def class_for(layer, target):
    """The class that knows most among those whose sources lie in layers 0..layer."""
    if layer >= 0:
        for c in range(1, len(AHEAD)):
            if AHEAD[c] >= target - layer:
                return c if target >= AHEAD[c] else 0
    return 0


@kept()
def predict(st, layer, target, out):
    """Predictor.predict."""
    rate(st, class_for(layer, target), target, out)


@kept(fastmath=True)
def learn(st, c, layer, wanted, chance):
    """One step of gradient descent of one class; wanted float32 [E] is 1 for what was picked; chance: scratch."""
    n_experts = wanted.shape[0]
    k = st.picked.shape[2] - 1
    rate(st, c, layer, chance)
    for e in range(n_experts):
        chance[e] = wanted[e] - chance[e]
    for f in range(N_FEATURES):
        slope = np.float32(0.0)
        for e in range(n_experts):
            slope += chance[e] * st.feature[layer, f, e]
        st.weight[1, c, layer, f] += slope * slope
        st.weight[0, c, layer, f] += (
            np.float32(FEATURE_STEP) * slope / math.sqrt(st.weight[1, c, layer, f] + 1.0)
        )
    step = np.float32(UNIT * max(STEP[2], STEP[0] / math.sqrt(1.0 + st.now[2] / STEP[1])))
    if c == 0:
        step *= np.float32(0.5)
    change = np.empty(n_experts, np.int32)
    at = np.float32((st.now[2] * 0.7548776662) % 1.0)
    for e in range(n_experts):  # rounded up or down in turn, so that small steps are not lost
        part = at + np.float32(0.6180339887) * e
        change[e] = math.floor(chance[e] * step + (part - math.floor(part)))
    for i in range(st.matrix.shape[0] // len(AHEAD)):
        which, m = source(st, c, i, layer)
        if m >= 0:
            for j in range(st.picked[which, m, k]):
                row = st.matrix[c * (st.matrix.shape[0] // len(AHEAD)) + i, layer, st.picked[which, m, j]]
                for e in range(n_experts):
                    row[e] = min(max(row[e] + change[e], -32767), 32767)


@kept(fastmath=True)
def describe(st, layer):
    """Bring the features of frequency up to date."""
    for e in range(st.average.shape[2]):
        usual = math.log(st.average[0, layer, e] + np.float32(1e-3))
        st.feature[layer, 1, e] = usual
        st.feature[layer, 2, e] = math.log(st.average[1, layer, e] + np.float32(1e-2)) - usual
        st.feature[layer, 3, e] = math.log(st.average[2, layer, e] + np.float32(1e-2)) - usual


@kept(fastmath=True)
def observe(st, layer, ids, follow):
    """Predictor.observe: learn from what a layer picked, ids int32 [n]; without `follow` only count it."""
    n_experts = st.feature.shape[2]
    k = st.picked.shape[2] - 1
    wanted = np.zeros(n_experts, np.float32)
    chance = np.empty(n_experts, np.float32)
    n = 0
    for i in range(ids.shape[0]):
        if n < k and 0 <= ids[i] < n_experts and wanted[ids[i]] == 0.0:
            wanted[ids[i]] = 1.0
            st.picked[0, layer, n] = ids[i]
            n += 1
    if n == 0:
        return
    for c in range(len(AHEAD)):
        if follow and layer >= AHEAD[c]:
            learn(st, c, layer, wanted, chance)
    st.picked[0, layer, k] = n
    for a in range(len(RATES)):
        keep = np.float32(max(RATES[a], 1.0 / (st.now[2] + 16.0)))
        for e in range(n_experts):
            st.average[a, layer, e] += keep * (wanted[e] - st.average[a, layer, e])
    describe(st, layer)
    if st.now[0] >= 0:
        for j in range(n):
            if st.counts[st.now[0], layer, st.picked[0, layer, j]] < FULL:
                st.counts[st.now[0], layer, st.picked[0, layer, j]] += 1


def _reached():
    return (layout(KIND),)


@kept(also=_reached)
def observe_at(address, layer, ids, n, _hidden):
    """Compiled.observe"""
    observe(pinned(address, KIND), layer, carray(int32_at(ids), n), True)
    return 0


@kept(also=_reached)
def predict_at(address, layer, target, out):
    """Compiled.predict"""
    st = pinned(address, KIND)
    predict(st, layer, target, carray(float32_at(out), st.feature.shape[2]))
    return 0


@kept()
def reset(st):
    """A sequence begins: there is no token before."""
    st.picked[:, :, st.picked.shape[2] - 1] = 0


@kept()
def observe_text(st, ids, tokens, starts, first):
    """Learn from text token by token: ids int32 [T, L, k] (-1: none), tokens int32 [T], starts uint8 [T]: 1 where
    a sequence begins. Tokens before `first` are only counted."""
    for t in range(ids.shape[0]):
        if starts[t] > 0:
            reset(st)
        begin(st, tokens[t])
        for layer in range(ids.shape[1]):
            observe(st, layer, ids[t, layer], t >= first)


def cold(n_layers: int, n_experts: int, top_k: int, rows: int) -> TableState:
    """The state that knows nothing: every expert equally likely."""
    n_classes = len(AHEAD)
    sources = MATRICES // (n_classes * n_layers * n_experts * n_experts * 2)
    sources = max(1, min(len(SOURCES[0]), sources))
    weight = np.zeros((2, n_classes, n_layers, N_FEATURES), np.float32)
    weight[0, :, :, 1] = 1.0
    weight[0, 0, :, 4], weight[0, 1:, :, 4] = 0.7, 0.4
    state = TableState(
        average=np.full((len(RATES), n_layers, n_experts), top_k / n_experts, np.float32),
        feature=np.ones((n_layers, N_FEATURES, n_experts), np.float32),
        weight=weight,
        matrix=np.zeros((n_classes * sources, n_layers, n_experts, n_experts), np.int16),
        picked=np.zeros((2, n_layers, top_k + 1), np.int32),
        row=np.zeros((2, rows), np.int32),
        counts=np.zeros((rows, n_layers, n_experts), np.uint8),  # pages are taken as rows are
        now=np.array([-1, 0, 0], np.int64),
    )
    state.feature[:, 4] = 0.0
    for layer in range(n_layers):
        describe(state, layer)
    return state
