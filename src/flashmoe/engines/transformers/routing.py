"""Joins a model's forwards to cache, recorder and prefetcher: what happens before, in and after the experts' layers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.errors import FlashMoEError
from flashmoe.prefetch.scheduler import Prefetcher
from flashmoe.routing.recorder import RoutingObserver

Int32 = NDArray[np.int32]


class Routing:
    """Implements `experts.Residence`. `begin` comes before every forward of the model."""

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self.cache: ExpertCache | None = None
        self.recorder: RoutingObserver | None = None
        self.prefetcher: Prefetcher | None = None
        #: Raised at the next layer.
        self.error: BaseException | None = None
        #: Called with (layer, ids [tokens, top_k]) to put other experts in place of the router's.
        self.override: Callable[[int, Int32], None] | None = None
        self._hidden: NDArray[np.float32] | None = None
        self._single = False

    def begin(self, tokens: torch.Tensor | None, count: int) -> None:
        """A forward of `count` tokens begins; their ids, where they are known."""
        if self.cache is None:
            raise FlashMoEError("this model was closed: load it again")
        self._single = count == 1
        self.cache.begin_step(count, self._top_k)
        if self.prefetcher is not None:
            ids = [-1] * count if tokens is None else tokens.reshape(-1).tolist()
            self.prefetcher.begin_step(ids)

    def see(self, hidden: torch.Tensor) -> None:
        """What the next layer's router has seen, [tokens, n]."""
        if self.prefetcher is not None and self._single:
            self._hidden = hidden.detach().to(torch.float32).reshape(-1).numpy()

    def route(self, layer: int, ids: Int32) -> Int32:
        if self.override is None:
            return ids
        ids = ids.copy()
        self.override(layer, ids)
        return ids

    def ensure(
        self, layer: int, ids: Int32, weights: torch.Tensor | None, each: Callable[[int, int], None]
    ) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        cache = self.cache
        if cache is None:
            raise FlashMoEError("this model was closed: load it again")
        began = time.perf_counter()
        stats = cache.stats[cache.phase]
        stalled, computed = stats.stall_seconds, 0.0

        def timed(expert: int, slot: int) -> None:
            nonlocal computed
            start = time.perf_counter()
            each(expert, slot)
            computed += time.perf_counter() - start

        meanwhile = None
        if weights is not None:
            if self.recorder is not None:
                self.recorder.add(layer, ids, weights.detach().to(torch.float32).numpy())
            meanwhile = self._look_ahead(layer, ids)
        cache.ensure(layer, ids, meanwhile=meanwhile, each=timed)
        waited = stats.stall_seconds - stalled
        stats.overhead_seconds += time.perf_counter() - began - waited - computed

    def _look_ahead(self, layer: int, ids: Int32) -> Callable[[], None] | None:
        """Lets the prefetcher see a layer's routing, while its reads are under way."""
        prefetcher, hidden = self.prefetcher, self._hidden
        if prefetcher is None:
            return None

        def look() -> None:
            if len(ids) > 1:
                prefetcher.routed_many(layer, ids)
                return
            if hidden is not None:
                prefetcher.predictor.see(layer, hidden)
            prefetcher.routed(layer, ids[0])

        return look


def count_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor | None, int]:
    """The token ids of a forward's arguments, where they are there, and how many tokens it evaluates."""
    ids = args[0] if args else kwargs.get("input_ids")
    if ids is not None:
        return ids, ids.numel()
    rows, length, _ = kwargs["inputs_embeds"].shape
    return None, rows * length
