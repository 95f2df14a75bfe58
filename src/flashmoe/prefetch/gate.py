"""Predictor `gate`: the routers of the layers ahead, applied to the hidden state of the present layer.

From HOBBIT (arXiv 2411.01433): the residual stream changes little from one layer to the next, so a router
of a layer ahead mostly chooses already what it will choose later. The present layer's router input is the normalised
hidden state times that layer's norm weights; for another layer the weights are exchanged. Needs an engine that shows
the hidden state, so it has no figures on traces.

Most of its time goes to reading the router's matrix from memory, so rows of residents are left out, and the others are
read in the type that they are stored in. What a logit is worth shows beside those that win: the residents that were
picked most lately are scored, too. How far above these a logit has to be is learned from what the layer's router picks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.prefetch.base import Float32, Int32, Predictor
from flashmoe.prefetch.gate_kernels import TRUST, chances, count, learn, products

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
        self._hidden: Float32 = np.empty(0, np.float32)
        self._scaled = self._hidden
        self._seen = self._asked = -1  # layers: whose input is known, and of whose router `_scores` are
        self._absent = 0

    def use_routers(self, routers: Sequence[Router]) -> None:
        """See Predictor. Before, it predicts nothing."""
        self.routers = routers

    def use_residency(self, slot_of: Int32) -> None:
        """See Predictor: residents get no chance."""
        self._slot_of = slot_of

    def see(self, layer: int, hidden: Float32) -> None:
        """See Predictor."""
        self._hidden, self._seen = hidden, layer
        if len(self._scaled) != len(hidden):
            self._scaled = np.empty_like(hidden)

    def make_state(self, n_layers: int, n_experts: int, top_k: int) -> GateState:
        """See Predictor."""
        self._slot_of = np.full((n_layers, n_experts), -1, np.int32)
        self._experts, self._scores = np.zeros(n_experts, np.int32), np.zeros(n_experts, np.float32)
        fit = np.tile([_SLOPE, 0.0, TRUST, 0.0, TRUST], (n_layers, 1))
        state = GateState(fit, np.zeros((n_layers, n_experts), np.float32))
        self._compile(GateState(*(part[0].copy() for part in state)), top_k)
        return state

    def _compile(self, state: GateState, top_k: int) -> None:
        """Now, not while it runs."""
        one, bias, ids = np.ones(1, np.float32), np.zeros_like(self._scores), self._experts[:0]
        experts, scores = self._experts, self._scores
        for kind in (np.float32, np.int16, np.uint16):
            table = np.zeros((len(experts), 1), kind)
            products(table, self._slot_of[0], state.picked, 1, one, one, one, one.copy(), experts, scores)
        chances(scores, experts, 1, 1, top_k, bias, bias[:0], state.fit, bias.copy())
        learn(scores, experts, 0, ids, state.fit)
        count(ids[np.newaxis], state.picked)

    def begin_sequence(self) -> None:
        """See Predictor."""

    def begin_step(self, token: int) -> None:
        """See Predictor."""
        self._seen = self._asked = -1

    def observe(self, layer: int, ids: Int32) -> None:
        """See Predictor."""
        if layer == self._asked:
            learn(self._scores, self._experts, self._absent, ids, self._state.fit[layer])
        count(ids[np.newaxis], self._state.picked[layer])

    def observe_many(self, layer: int, ids: Int32, tokens: Int32) -> None:
        """See Predictor."""
        count(ids, self._state.picked[layer])

    def check_model(self, model: Mapping[str, Any]) -> None:
        """See Predictor: the routers are the model's own."""

    def predict(self, layer: int, target: int, out: Float32) -> None:
        """See Predictor; all 0 where the hidden state of `layer` is not known."""
        out[:] = 0
        if layer < 0 or layer != self._seen or not self.routers:
            return
        router, norm, state = self.routers[target], self.routers[layer].norm, self._state
        experts, scores = self._experts, self._scores
        self._asked = target
        self._absent, found = products(
            router.weights, self._slot_of[target], state.picked[target], _HOT * self.top_k,
            self._hidden, norm, router.norm, self._scaled, experts, scores,
        )  # fmt: skip
        chances(
            scores, experts, self._absent, found, self.top_k,
            router.bias, router.choice_bias, state.fit[target], out,
        )  # fmt: skip
