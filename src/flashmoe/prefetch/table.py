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

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from flashmoe.common.compiled import Pinned, address_of
from flashmoe.prefetch.base import OBSERVE, PREDICT, Compiled, Float32, Int32, PredictorError
from flashmoe.prefetch.batch import MicroBatch, TextPredictor
from flashmoe.prefetch.files import PredictorFile
from flashmoe.prefetch.table_kernels import (
    FULL,
    KIND,
    PROBES,
    TableState,
    begin,
    cold,
    describe,
    find,
    observe,
    observe_at,
    observe_text,
    predict,
    predict_at,
    reset,
)

PROMPT = 128  # last tokens of a micro-batch whose every choice is followed; those before are counted
_MOST_STEPS = 1 << 60


class Table(TextPredictor):
    """Learns routing as it runs, by token, by the layers behind, by frequency.

    file: a start from `flashmoe train prefetch --kind table`. memory: most bytes of the token table (rows of L * E
    bytes, taken as tokens come).
    """

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
        self._pinned: Pinned | None = None

    def restrict(self, nbytes: int) -> None:
        """See Predictor: fewer tokens are known."""
        self._most = nbytes

    def check_model(self, model: Mapping[str, Any]) -> None:
        if self.trained is not None:
            self.trained.check_model(model)

    def make_state(self, n_layers: int, n_experts: int, top_k: int) -> TableState:
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
        Pinned(KIND, compiled)
        address_of(observe_at, OBSERVE), address_of(predict_at, PREDICT)
        state = cold(n_layers, n_experts, top_k, rows)
        if self.trained is not None:
            self.trained.check_shape(n_layers, n_experts, top_k)
            self._take(state, self.trained.arrays)
        return state

    def begin_sequence(self) -> None:
        self._settle()
        reset(self._state)

    def begin_step(self, token: int) -> None:
        self._settle()
        begin(self._state, token)

    def observe(self, layer: int, ids: Int32) -> None:
        observe(self._state, layer, ids, True)

    def follow(self, batch: MicroBatch) -> None:
        """See TextPredictor. The last PROMPT tokens are learned from as single ones are, of those before only the
        counts are kept, which takes a tenth of the time."""
        ids, tokens = batch.take()
        observe_text(self._state, ids, tokens, np.zeros(len(ids), np.uint8), len(ids) - PROMPT)

    def predict(self, layer: int, target: int, out: Float32) -> None:
        predict(self._state, layer, target, out)

    def compiled(self) -> Compiled | None:
        if self._pinned is None or self._pinned.values is not self._state:
            self._pinned = Pinned(KIND, self._state)
        return Compiled(
            address_of(observe_at, OBSERVE), address_of(predict_at, PREDICT), self._pinned.address
        )

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
