"""Which experts the next layer reads for a short prompt, by the routers' inputs of its tokens.

A micro-batch of hundreds of tokens asks a layer for nearly all of its experts, and `ExpertCache` then reads ahead all
that are absent. One of a few tokens asks for a fraction: the next layer's router says for which, applied to the hidden
states of this layer (HOBBIT, arXiv 2411.01433).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from flashmoe.cache.expert_cache import SURE
from flashmoe.cache.residency import Residency
from flashmoe.prefetch.base import Float32, Int32, Predictor

_TOKENS = 32  # asked about at most, spread over the micro-batch
_LIKELY = 0.5  # the least chance that is worth a read
_FORGET = 0.98  # of what guesses were worth, per layer
_TRIALS = 32  # guesses that are made before it is asked what they were worth


class PromptGuesses:
    """Guesses for micro-batches of prompts, while they are right more often than not. L layers of E experts."""

    def __init__(self, predictors: Sequence[Predictor], residency: Residency) -> None:
        self._predictors = [predictor for predictor in predictors if predictor.needs_hidden]
        self._residency = residency
        self._guessed: tuple[int, list[int]] = -1, []  # the layer, and experts of it
        self._made = self._right = 0.0

    def next_layer(self, layer: int, ids: Int32, hidden: Callable[[], Float32 | None]) -> list[int]:
        """Experts of the layer after `layer` that are worth a read, the likeliest first.

        ids: what the router of `layer` has picked, int32 [tokens, k]; hidden: gives its inputs, float32 [tokens, n], or
        None; called only where they are of use.
        """
        if not self._predictors:
            return []
        picked = np.unique(ids)
        self._note(layer, picked)
        target = layer + 1
        if target == self._residency.n_layers or len(picked) >= SURE * self._residency.n_experts:
            return []
        absent = self._residency.slot_of[target] < 0
        if not absent.any() or (self._made >= _TRIALS and 2 * self._right < self._made):
            return []
        if (seen := hidden()) is None:
            return []
        chances, best = np.zeros((2, self._residency.n_experts), np.float32)
        for predictor in self._predictors:
            predictor.predict_many(layer, target, seen[:: -(-len(seen) // _TOKENS)], chances)
            np.maximum(best, chances, out=best)
        likely = np.flatnonzero(absent & (best >= _LIKELY))
        experts: list[int] = likely[np.argsort(-best[likely], kind="stable")].tolist()
        self._guessed = target, experts
        return experts

    def _note(self, layer: int, picked: Int32) -> None:
        """A layer's router has picked these experts."""
        self._made, self._right = _FORGET * self._made, _FORGET * self._right
        target, experts = self._guessed
        if target == layer:
            self._made += len(experts)
            self._right += int(np.isin(experts, picked).sum())
        self._guessed = -1, []
