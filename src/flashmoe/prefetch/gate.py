"""Predictor `gate`: the routers of the layers ahead, applied to the hidden state of the present layer.

From HOBBIT (arXiv 2411.01433): the residual stream changes little from one layer to the next, so a router
of a layer ahead mostly chooses already what it will choose later. The present layer's router input is the normalised
hidden state times that layer's norm weights; for another layer the weights are exchanged. Needs an engine that shows
the hidden state, so it has no figures on traces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.common.kept import kept
from flashmoe.prefetch.base import Float32, Int32, Predictor


class Router(NamedTuple):
    """One layer's way from the normalised hidden state (n numbers) to the choice among E experts."""

    weights: Float32  # [E, n]
    norm: Float32  # [n] the norm's weights; ones where there are none
    bias: Float32  # [E] added to the logits
    choice_bias: (
        Float32  # [E] added to the sigmoids of the logits before the choice (DeepSeek-V3); empty: none
    )


@kept(fastmath=True, nogil=True)
def score(
    weights: Any,
    bias: Any,
    choice_bias: Any,
    hidden: Any,
    old_norm: Any,
    new_norm: Any,
    scaled: Any,
    top_k: Any,
    out: Any,
) -> None:  # pragma: no cover - compiled
    """Fill out [E] with chances by rank: near 1 for the router's first choice, falling to 0 at rank 3k."""
    n = hidden.shape[0]
    for i in range(n):
        scaled[i] = hidden[i] * new_norm[i] / old_norm[i] if old_norm[i] != 0 else hidden[i]
    for e in range(weights.shape[0]):
        total = np.float32(0)
        row = weights[e]
        for i in range(n):
            total += row[i] * scaled[i]
        total += bias[e]
        if choice_bias.shape[0] > 0:
            total = np.float32(1) / (np.float32(1) + np.exp(-total)) + choice_bias[e]
        out[e] = total
    order = np.argsort(-out)
    last = min(3 * top_k, len(order))
    out[:] = 0
    for rank in range(last):
        out[order[rank]] = np.float32(1) - np.float32(rank + 0.5) / np.float32(last)


class Gate(Predictor):
    """Applies the model's own routers ahead of time. Nothing is learned, nothing is kept between steps."""

    name = "gate"
    needs_hidden = True

    def __init__(self) -> None:
        super().__init__()
        self.routers: Sequence[Router] = ()
        self._hidden: Float32 = np.empty(0, np.float32)
        self._seen = -1
        self._scaled: NDArray[np.float32] = np.empty(0, np.float32)

    def use_routers(self, routers: Sequence[Router]) -> None:
        """See Predictor. Before, it predicts nothing."""
        self.routers = routers

    def see(self, layer: int, hidden: Float32) -> None:
        """See Predictor."""
        self._hidden, self._seen = hidden, layer
        if len(self._scaled) != len(hidden):
            self._scaled = np.empty_like(hidden)

    def make_state(self, n_layers: int, n_experts: int, top_k: int) -> NamedTuple:
        """See Predictor."""
        one, table = np.ones(1, np.float32), np.ones((n_experts, 1), np.float32)
        out = np.zeros(n_experts, np.float32)
        score(
            table, out.copy(), one[:0], one, one, one, one.copy(), top_k, out
        )  # compiled now, not while it runs
        return _NoState()

    def begin_sequence(self) -> None:
        """See Predictor."""

    def begin_step(self, token: int) -> None:
        """See Predictor."""
        self._seen = -1

    def observe(self, layer: int, ids: Int32) -> None:
        """See Predictor."""

    def observe_many(self, layer: int, ids: Int32, tokens: Int32) -> None:
        """See Predictor."""

    def check_model(self, model: Mapping[str, Any]) -> None:
        """See Predictor: the routers are the model's own."""

    def predict(self, layer: int, target: int, out: Float32) -> None:
        """See Predictor; all 0 where the hidden state of `layer` is not known."""
        if layer < 0 or layer != self._seen or not self.routers:
            out[:] = 0
            return
        router = self.routers[target]
        old_norm = self.routers[layer].norm
        score(
            router.weights,
            router.bias,
            router.choice_bias,
            self._hidden,
            old_norm,
            router.norm,
            self._scaled,
            self.top_k,
            out,
        )


class _NoState(NamedTuple):
    pass
