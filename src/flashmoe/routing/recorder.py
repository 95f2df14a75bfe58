"""Collects routing while an engine runs, cheaply enough to leave on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashmoe.errors import TraceError
from flashmoe.routing.trace import DECODE, RoutingTrace


class RoutingObserver(Protocol):
    """Sees what every layer routes: at once, or when the step has ended."""

    def begin_step(self) -> None:
        """Tokens are about to be evaluated at once; the pool is as the last ones have left it."""

    def add(self, layer: int, ids: NDArray[Any], weights: NDArray[Any] | None = None) -> None:
        """What layer 0..L-1 routed in this step: ids [n, k], weights [n, k] or None."""


class Recorder:
    """A growing trace. Per step: `add` for each MoE layer, then `end_step`.

    All rows go straight into arrays that double when full, so that `add` is two small copies.
    """

    def __init__(
        self,
        n_layers: int,
        top_k: int,
        n_experts: int,
        weights: bool = True,
        model: Mapping[str, Any] | None = None,
        first_moe_layer: int = 0,
        capacity: int = 4096,
        ranked: bool = False,
    ) -> None:
        """L layers, k experts per token out of E; `weights`: keep router weights; capacity: tokens to begin
        with."""
        self.n_experts, self.top_k = n_experts, top_k
        self.model = dict(model or {})
        self.first_moe_layer = first_moe_layer
        self._ids = np.full((capacity, n_layers, top_k), -1, np.int16)
        self._weights = np.zeros((capacity, n_layers, top_k), np.float16) if weights else None
        # of the best 2k experts
        room = capacity, n_layers, 2 * top_k
        self._ranked = np.full(room, -1, np.int16) if ranked else None
        self._scores = np.zeros(room, np.float16) if ranked else None
        self._ranges = np.zeros(room[:2], np.float16) if ranked else None
        self._meta = np.zeros((capacity, 4), np.int32)  # token, sequence, phase, step
        self._pos = 0  # first row of the step under way
        self._rows = 0  # rows of the step under way
        self._step = 0

    def __len__(self) -> int:
        """Tokens of completed steps."""
        return self._pos

    def begin_step(self) -> None:
        """See RoutingObserver."""

    def add(self, layer: int, ids: NDArray[Any], weights: NDArray[Any] | None = None) -> None:
        """What layer 0..L-1 routed in this step: ids [n, k] (any integer type), weights [n, k] or None.

        A layer that saw fewer tokens than others of the step saw the last ones. One that picks fewer experts than k has
        -1 in the place of others.
        """
        n, k = ids.shape
        self._make_rows(n)
        end = self._pos + self._rows
        self._ids[end - n : end, layer, :k] = ids
        if weights is not None and self._weights is not None:
            self._weights[end - n : end, layer, :k] = weights

    def add_ranking(self, layer: int, ids: NDArray[Any], scores: NDArray[Any], ranges: NDArray[Any]) -> None:
        """The best experts of layer 0..L-1 in this step, the best first, [n, 2k]; before `add` is called for it.

        scores: logarithms of the router's scores, less the best one's. ranges: of all experts' logarithms, [n].
        """
        n, k = ids.shape
        assert self._ranked is not None
        assert self._scores is not None
        assert self._ranges is not None
        self._make_rows(n)
        end = self._pos + self._rows
        self._ranked[end - n : end, layer, :k] = ids
        self._scores[end - n : end, layer, :k] = np.maximum(scores, -1e4)
        self._ranges[end - n : end, layer] = np.minimum(ranges, 1e4)

    def end_step(self, tokens: Any = -1, phase: int = DECODE, sequence: Any = 0) -> None:
        """Close a step: its n tokens (int or [n]), DECODE or PREFILL, its sequence (int or [n])."""
        end = self._pos + self._rows
        if self._rows == 0:
            return
        rows = self._meta[self._pos : end]
        rows[:, 0] = tokens
        rows[:, 1] = sequence
        rows[:, 2] = phase
        rows[:, 3] = self._step
        self._step += 1
        self._pos = end
        self._rows = 0

    def drop_step(self) -> None:
        """Forget the step under way (the engine failed in the middle of it)."""
        self._ids[self._pos :] = -1
        if self._ranked is not None:
            self._ranked[self._pos :] = -1
        self._rows = 0

    def trace(self) -> RoutingTrace:
        """A copy of what was recorded so far. Raises TraceError where that is nothing."""
        if self._pos == 0:
            raise TraceError("nothing was recorded: generate at least one token")
        n = self._pos
        return RoutingTrace(
            expert_ids=self._ids[:n].copy(),
            num_experts=self.n_experts,
            token_id=self._meta[:n, 0],
            sequence_id=self._meta[:n, 1],
            phase=self._meta[:n, 2].astype(np.uint8),
            step=self._meta[:n, 3],
            router_weights=None if self._weights is None else self._weights[:n].copy(),
            ranked_ids=None if self._ranked is None else self._ranked[:n].copy(),
            ranked_scores=None if self._scores is None else self._scores[:n].copy(),
            score_range=None if self._ranges is None else self._ranges[:n].copy(),
            first_moe_layer=self.first_moe_layer,
            model=self.model,
        )

    def save(self, path: str | Path) -> None:
        """Write what was recorded so far to a trace file, whole or not at all."""
        self.trace().save(path)

    def _make_rows(self, n: int) -> None:
        """Have room for `n` rows in the step under way."""
        if n > self._rows:
            if self._pos + n > len(self._ids):
                self._grow(self._pos + n)
            self._rows = n

    def _grow(self, needed: int) -> None:
        size = max(needed, 2 * len(self._ids))
        filled = {"_ids": -1, "_weights": 0, "_ranked": -1, "_scores": 0, "_ranges": 0, "_meta": 0}
        for name, fill in filled.items():
            old = getattr(self, name)
            if old is not None:
                new = np.full((size, *old.shape[1:]), fill, old.dtype)
                new[: self._pos + self._rows] = old[: self._pos + self._rows]
                setattr(self, name, new)
