"""Routing learned while running: the token's own counts, what the layers behind picked, and recent frequency.

For each target layer and expert, the logit of being picked is the sum of

- a few features with weights of their own per layer: the logarithm of the expert's frequency (moving averages at
  three rates) and of how much more often than usual it served this very token before (a table of counts, a row
  per token, of limited memory);
- a matrix [E, E] for each of some earlier choices of the same text: the experts that layers 1, 2, 3 (or 2, 3, 4;
  or 4, 5, 6) behind the target picked for this token, and those that the target itself, and layers ahead of it,
  picked for the token before. Each picked expert adds its row.

All weights are those of a logistic regression and follow every choice of the router by stochastic gradient
descent: nothing is trained beforehand, though a file of `flashmoe train prefetch` gives a start. There are four
sets ("classes"): for predictions from the token alone and from 1, 2 and 4 layers behind the target. Every input
of a class is the same when a prediction is asked for and when its layer is observed, so that learning uses what
predicting uses.

Not from a paper. That token identity finds about half of the experts is known from SiDA-MoE (arXiv 2310.18859,
section 3), that the layers behind find more from ProMoE (arXiv 2410.22134, section 3.1)."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.common.kept import kept
from flashmoe.prefetch.base import AHEAD, Float32, Int32, PredictorError
from flashmoe.prefetch.batch import MicroBatch, TextPredictor
from flashmoe.prefetch.files import PredictorFile

#: Where each class (one for each distance of AHEAD) looks: d > 0: d layers behind the target, this token; d <= 0: -d
#: layers ahead of the target, the token before; NONE: nowhere.
NONE = 99
SOURCES = ((0, -3, -6, NONE), (1, 2, 3, 0), (2, 3, 4, 0), (4, 5, 6, 0))
MATRICES = 64 << 20  # most bytes of matrices: models of many experts use fewer sources
N_FEATURES = 5  # 1, log frequency, recent and very recent against it, token against it
RATES = (0.003, 0.03, 0.15)  # of the moving averages
UNIT = 4096  # matrices hold int16 of this fraction
STEP = (
    0.12,
    400.0,
    0.015,
)  # of the matrices: at the start, tokens until it falls by sqrt(2), least; half for class 0
FEATURE_STEP = 0.1
PRIOR = 0.5  # weight of the usual frequency against one occurrence of a token
PROMPT = 128  # last tokens of a micro-batch whose every choice is followed; those before are counted
PROBES = 8  # rows of the token table that a token may take
FULL = 255  # occurrences at which a row is halved
_MOST_STEPS = 1 << 60


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


class Table(TextPredictor):
    """Learns online. file: a start from `flashmoe train prefetch --kind table`; memory: most bytes of the token
    table (rows of L * E bytes, taken as tokens come)."""

    name: ClassVar[str] = "table"

    def __init__(
        self,
        file: str | Path | None = None,
        trained: PredictorFile | None = None,
        memory: int = 8 << 20,
    ) -> None:
        super().__init__()
        self.trained = PredictorFile.load(file, self.name) if file is not None else trained
        self.memory = memory
        self._most: float = np.inf

    def restrict(self, nbytes: int) -> None:
        """See Predictor: fewer tokens are known."""
        self._most = nbytes

    def check_model(self, model: Mapping[str, Any]) -> None:
        """See Predictor."""
        if self.trained is not None:
            self.trained.check_model(model)

    def make_state(self, n_layers: int, n_experts: int, top_k: int) -> TableState:
        """See Predictor."""
        least = cold(n_layers, n_experts, top_k, 2 * PROBES)
        row = least.counts[0].nbytes + least.row[:, 0].nbytes
        memory = min(self.memory, self._most - sum(array.nbytes for array in least) + 2 * PROBES * row)
        rows = min(max(int(memory // row), 2 * PROBES), 1 << 17)
        compiled = cold(1, 1, 1, 2 * PROBES)  # so that the first token does not wait for the compiler
        observe_text(compiled, np.zeros((1, 1, 1), np.int32), np.zeros(1, np.int32), np.ones(1, np.uint8), 0)
        begin(compiled, 0)
        observe(compiled, 0, np.zeros(1, np.int32), True)
        predict(compiled, -1, 0, np.zeros(1, np.float32))
        reset(compiled)
        state = cold(n_layers, n_experts, top_k, rows)
        if self.trained is not None:
            self.trained.check_shape(n_layers, n_experts, top_k)
            self._take(state, self.trained.arrays)
        return state

    def begin_sequence(self) -> None:
        """See Predictor."""
        self._settle()
        reset(self._state)

    def begin_step(self, token: int) -> None:
        """See Predictor."""
        self._settle()
        begin(self._state, token)

    def observe(self, layer: int, ids: Int32) -> None:
        """See Predictor."""
        observe(self._state, layer, ids, True)

    def follow(self, batch: MicroBatch) -> None:
        """See TextPredictor. The last PROMPT tokens are learned from as single ones are, of those before only the
        counts are kept, which takes a tenth of the time."""
        ids, tokens = batch.take()
        observe_text(self._state, ids, tokens, np.zeros(len(ids), np.uint8), len(ids) - PROMPT)

    def predict(self, layer: int, target: int, out: Float32) -> None:
        """See Predictor."""
        predict(self._state, layer, target, out)

    def learn_text(self, ids: NDArray[Any], tokens: NDArray[Any], starts: NDArray[Any]) -> None:
        """Learn from recorded routing: ids [T, L, k], tokens [T] (-1: unknown), starts [T]: 1 where a sequence
        begins."""
        kinds = (np.int32, np.int32, np.uint8)
        text, words, begins = (
            np.ascontiguousarray(a, kind) for a, kind in zip((ids, tokens, starts), kinds, strict=True)
        )
        observe_text(self._state, text, words, begins, 0)

    # Saved without the rows of the token table that are free ----------------------------------------------

    def state(self) -> dict[str, NDArray[Any]]:
        """See Predictor. Rows [2, U] and counts [U, L, E] of the U tokens known; what can be computed from the
        rest (features) is left out."""
        self._settle()
        arrays = {name: np.array(value) for name, value in self._state._asdict().items() if name != "counts"}
        used = np.flatnonzero(self._state.row[0])
        arrays["row"] = np.ascontiguousarray(self._state.row[:, used])  # savers write the memory as it lies
        arrays["counts"] = self._state.counts[used]
        del arrays["feature"]
        return arrays

    def load_state(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """See Predictor."""
        self._batch = MicroBatch(self.n_layers, self.top_k)
        fresh = cold(self.n_layers, self.n_experts, self.top_k, self._state.row.shape[1])
        self._take(fresh, arrays)
        self._state = fresh

    def _take(self, state: TableState, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Copy saved arrays into a cold state. Raises PredictorError where they do not fit."""
        row, count = arrays.get("row"), arrays.get("counts")
        n_layers, _, n_experts = state.feature.shape
        fits = row is not None and count is not None and row.shape == (2, len(count))
        if not fits or count is None or count.shape[1:] != (n_layers, n_experts):
            raise PredictorError(f"saved state does not fit predictor {self.name!r} (counts)")
        for name in ("average", "weight", "matrix", "picked", "now"):
            saved, own = arrays.get(name), getattr(state, name)
            finite = saved is not None and (saved.dtype.kind != "f" or np.isfinite(saved).all())
            if saved is None or not finite or saved.shape != own.shape or saved.dtype != own.dtype:
                raise PredictorError(f"saved state does not fit predictor {self.name!r} ({name})")
            own[...] = saved
        # shares, sums of squares and a clock: logarithms and roots are taken of them
        shares = ((state.average >= 0) & (state.average < 2)).all()
        if not shares or (state.weight[1] < 0).any() or not 0 <= state.now[2] <= _MOST_STEPS:
            raise PredictorError(f"saved state of predictor {self.name!r} is damaged (average, weight, now)")
        if (state.picked < 0).any() or (state.picked[..., :-1] >= n_experts).any():
            raise PredictorError(f"saved state of predictor {self.name!r} is damaged (picked)")
        np.clip(state.picked, 0, max(n_experts - 1, state.picked.shape[2] - 1), out=state.picked)
        state.picked[..., -1] = np.minimum(state.picked[..., -1], state.picked.shape[2] - 1)
        assert row is not None
        order = np.argsort(-row[1], kind="stable")  # the most frequent first, where memory is smaller now
        for i in order[: state.row.shape[1]]:
            token = int(row[0, i]) - 1
            if token < 0:
                continue
            at = find(state, token)
            state.row[1, at], state.counts[at] = min(max(int(row[1, i]), 0), FULL), count[i]
        state.now[0] = -1
        for layer in range(n_layers):
            describe(state, layer)
