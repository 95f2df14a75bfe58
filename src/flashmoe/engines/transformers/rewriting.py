"""Approximate routing in the library's own forwards (see routing.rewrite), between a layer's router and its experts.

The experts module gets ids and weights, no scores: these are computed again from the router's matrix and its input.
That is possible where the weights are the softmax of these scores, over all experts or over those that were picked;
whether they are is looked at for every token, and a model of another kind is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from flashmoe.errors import ModelError
from flashmoe.routing.rewrite import Rewriter, leave_out, substitute

Int32 = NDArray[np.int32]
_NEAR = 0.1  # relative: BF16 rounds scores, other kinds of weights are farther off


class RouteRewriter:
    """Rewrites the routes of decoded tokens."""

    def __init__(
        self,
        rewriter: Rewriter,
        slot_of: Int32,
        matrices: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    ) -> None:
        """slot_of: [L, E] of the pool's residency. matrices: of every layer's router [E, n], and its bias [E]."""
        self._state, self._slot_of, self._matrices = rewriter.state, slot_of, matrices

    def __call__(
        self, layer: int, ids: Int32, hidden: torch.Tensor, weights: torch.Tensor
    ) -> tuple[Int32, torch.Tensor]:
        """The ids, [tokens, k], and weights of the same shape to compute with: the same objects where nothing changes.

        hidden: the router's input, [tokens, n]. Raises ModelError for a model whose weights are made in another way.
        """
        matrix, bias = self._matrices[layer]
        # in the model's type, as most routers do it
        scores = functional.linear(hidden.detach(), matrix, bias).float().numpy()
        given = weights.detach().float().numpy()
        gathered = np.take_along_axis(scores, ids, axis=1)
        totals = _totals(scores, gathered, given)
        made = ids.copy()
        changed = 0
        for row, own, kept in zip(scores, made, gathered, strict=True):
            changed += substitute(self._state, self._slot_of, layer, row, True, row, True, own)
            kept[:] = row[own]
            changed += leave_out(self._state, self._slot_of, layer, row, True, own, kept)
        if not changed:
            return ids, weights
        if totals is None:
            shares = np.exp(gathered - _log_sum(scores))
        else:
            shares = totals * np.exp(gathered - _log_sum(gathered))
        return made, torch.from_numpy(shares).to(weights)


def _totals(
    scores: NDArray[np.float32], gathered: NDArray[np.float32], given: NDArray[np.float32]
) -> NDArray[np.float32] | None:
    """What every token's weights add up to, [tokens, 1], where they are normalised over those picked; None where they
    are shares of all experts. Raises ModelError where they are neither."""
    if np.allclose(given, np.exp(gathered - _log_sum(scores)), rtol=_NEAR):
        return None
    totals: NDArray[np.float32] = given.sum(axis=1, keepdims=True)
    if np.allclose(given, totals * np.exp(gathered - _log_sum(gathered)), rtol=_NEAR):
        return totals
    raise ModelError(
        "this model's router weighs experts in a way that --approx does not know here: run it without, or as a GGUF"
    )


def _log_sum(scores: NDArray[np.float32]) -> Any:
    """The logarithm of the sum of exponentials, [tokens, 1]."""
    most = scores.max(axis=1, keepdims=True)
    return most + np.log(np.exp(scores - most).sum(axis=1, keepdims=True))
