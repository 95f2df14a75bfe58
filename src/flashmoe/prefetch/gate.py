"""Predictor `gate`: the routers of the layers ahead, applied to the hidden state of the present layer.

From HOBBIT (arXiv 2411.01433): the residual stream changes little from one layer to the next, so a router
of a layer ahead mostly chooses already what it will choose later. The present layer's router input is the normalised
hidden state times that layer's norm weights; for another layer the weights are exchanged. The mean of what changes from
layer to layer is learned and added, as in DALI (arXiv 2602.03495). Needs an engine that shows the hidden state, so it
has no figures on traces.

Most of its time goes to reading the router's matrix from memory, so rows of residents are left out, and the others are
read in the type that they are stored in. What a logit is worth shows beside those that win: the residents that were
picked most lately are scored, too. How far above these a logit has to be is learned from what the layer's router picks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.common.compiled import Pinned, address_of
from flashmoe.prefetch.base import OBSERVE, PREDICT, Compiled, Float32, Int32, Predictor
from flashmoe.prefetch.gate_kernels import (
    ASKED,
    FOLLOWED,
    HIDDEN,
    KIND,
    SEEN,
    TRUST,
    TYPES,
    GateCalls,
    count,
    observe_at,
    predict_at,
)

_SLOPE = 3.0  # of the chance by the margin, before anything was learned
_HOT = 2  # residents that are scored, in experts per token


class Router(NamedTuple):
    """One layer's way from the normalised hidden state (n numbers) to the choice among E experts."""

    weights: NDArray[Any]  # [E, n] float32, or the bits of float16 (int16) or of bfloat16 (uint16)
    norm: Float32  # [n] the norm's weights; ones where there are none
    bias: Float32  # [E] added to the logits
    choice_bias: (
        Float32  # [E] added to the sigmoids of the logits before the choice (DeepSeek-V3); empty: none
    )


class GateState(NamedTuple):
    """What is learned of each layer: see `gate_kernels`."""

    fit: NDArray[np.float64]  # [L, 5] what a margin means, `learn`
    picked: NDArray[np.float32]  # [L, E] how often, `count`


class Gate(Predictor):
    """Applies the model's own routers ahead of time. It learns only how much a high logit says."""

    name = "gate"
    needs_hidden = True

    def __init__(self) -> None:
        super().__init__()
        self.routers: Sequence[Router] = ()
        self._hidden: Float32 = np.empty(0, np.float32)  # what `number` has the address of

    def use_routers(self, routers: Sequence[Router]) -> None:
        """See Predictor. Before, it predicts nothing."""
        self.routers = [
            router._replace(**{name: np.ascontiguousarray(value) for name, value in router._asdict().items()})
            for router in routers
        ]
        rows = [
            (
                *(int(part.ctypes.data) if part.size else 0 for part in router),
                TYPES.index(router.weights.dtype),
            )
            for router in self.routers
        ]
        width = len(self.routers[0].norm)
        states = np.zeros((self.n_layers + 2, width), np.float32)
        self._pin(
            self._calls._replace(
                scaled=states[0], before=states[1], shift=states[2:], routers=np.array(rows, np.int64)
            )
        )

    def use_residency(self, slot_of: Int32) -> None:
        """See Predictor: residents get no chance."""
        self._pin(self._calls._replace(slot_of=slot_of))

    def see(self, layer: int, hidden: Float32) -> None:
        self._hidden = np.ascontiguousarray(hidden, np.float32)
        self._calls.number[SEEN], self._calls.number[HIDDEN] = layer, self._hidden.ctypes.data

    def make_state(self, n_layers: int, n_experts: int, top_k: int) -> GateState:
        fit = np.tile([_SLOPE, 0.0, TRUST, 0.0, TRUST], (n_layers, 1))
        state = GateState(fit, np.zeros((n_layers, n_experts), np.float32))
        calls = GateCalls(
            *state,
            slot_of=np.full((n_layers, n_experts), -1, np.int32),
            experts=np.zeros(n_experts, np.int32),
            scores=np.zeros(n_experts, np.float32),
            scaled=np.empty(0, np.float32),
            shift=np.empty((n_layers, 0), np.float32),
            before=np.empty(0, np.float32),
            steps=np.zeros(n_layers, np.int64),
            number=np.array([-1, -1, 0, 0, top_k, _HOT * top_k, -1], np.int64),
            routers=np.zeros((0, 5), np.int64),
        )
        self._pin(calls)
        self.compiled()  # now, not while it runs
        count(np.zeros((0, 1), np.int32), state.picked[0])
        return state

    def _pin(self, calls: GateCalls) -> None:
        self._calls, self._pinned = calls, Pinned(KIND, calls)

    def begin_sequence(self) -> None:
        """See Predictor."""

    def begin_step(self, token: int) -> None:
        self._calls.number[[SEEN, ASKED, FOLLOWED]] = -1

    def observe(self, layer: int, ids: Int32) -> None:
        observe_at(self._pinned.address, layer, ids.ctypes.data, len(ids), 0)

    def observe_many(self, layer: int, ids: Int32, tokens: Int32) -> None:
        count(ids, self._calls.picked[layer])

    def check_model(self, model: Mapping[str, Any]) -> None:
        """See Predictor: the routers are the model's own."""

    def predict(self, layer: int, target: int, out: Float32) -> None:
        """See Predictor; all 0 where the hidden state of `layer` is not known."""
        predict_at(self._pinned.address, layer, target, out.ctypes.data)

    def compiled(self) -> Compiled | None:
        return Compiled(
            address_of(observe_at, OBSERVE), address_of(predict_at, PREDICT), self._pinned.address
        )
