"""Joins a model's forwards to cache, recorder and prefetcher: what happens before, in and after the experts' layers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.engines.transformers.slots import Each, Residents, Weights
from flashmoe.errors import FlashMoEError
from flashmoe.prefetch.scheduler import Prefetcher
from flashmoe.routing.recorder import RoutingObserver

Int32 = NDArray[np.int32]


class Routing:
    """Implements `experts.Residence`. `begin` comes before every forward of the model."""

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self._cache: ExpertCache | None = None
        self._residents: Residents | None = None
        self.recorder: RoutingObserver | None = None
        self.prefetcher: Prefetcher | None = None
        #: Raised at the next layer.
        self.error: BaseException | None = None
        #: Called with (layer, ids [tokens, top_k]) to put other experts in place of the router's.
        self.override: Callable[[int, Int32], None] | None = None
        self._hidden: NDArray[np.float32] | None = None
        self._single = False

    def open(self, cache: ExpertCache, residents: Residents) -> None:
        """Experts come from `residents`; `cache` is the one in RAM, whose phase and counters are the engine's."""
        self._cache, self._residents = cache, residents

    def close(self) -> None:
        """There are no experts any more."""
        self._cache = self._residents = None

    @property
    def cache(self) -> ExpertCache:
        """The cache in RAM. Raises FlashMoEError after `close`."""
        if self._cache is None:
            raise FlashMoEError("this model was closed: load it again")
        return self._cache

    @property
    def residents(self) -> Residents:
        """Where experts come from. Raises FlashMoEError after `close`."""
        if self._residents is None:
            raise FlashMoEError("this model was closed: load it again")
        return self._residents

    def begin(self, tokens: torch.Tensor | None, count: int) -> None:
        """A forward of `count` tokens begins; their ids, where they are known."""
        self._single = count == 1
        self.residents.begin_step(count, self._top_k)
        if self.prefetcher is not None:
            ids = [-1] * count if tokens is None else tokens.reshape(-1).tolist()
            self.prefetcher.begin_step(ids)

    def see(self, hidden: torch.Tensor) -> None:
        """What the next layer's router has seen, [tokens, n]."""
        if self.prefetcher is not None and self._single:
            self._hidden = hidden.detach().to("cpu", torch.float32).reshape(-1).numpy()

    def route(self, layer: int, ids: Int32) -> Int32:
        if self.override is None:
            return ids
        ids = ids.copy()
        self.override(layer, ids)
        return ids

    @property
    def computes(self) -> bool:
        return self.residents.computes

    def ensure(
        self, layer: int, ids: Int32, weights: torch.Tensor | None, each: Each, *, anywhere: bool
    ) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        residents, stats = self.residents, self.cache.stats[self.cache.phase]
        began = time.perf_counter()
        stalled, computed = stats.stall_seconds + residents.waited, 0.0

        def timed(expert: int, slot: Weights) -> None:
            nonlocal computed
            start = time.perf_counter()
            each(expert, slot)
            computed += time.perf_counter() - start

        def meanwhile() -> None:
            if weights is not None:
                self._look_ahead(layer, ids)

        if weights is not None and self.recorder is not None:
            self.recorder.add(layer, ids, weights.detach().to("cpu", torch.float32).numpy())
        residents.ensure(layer, ids, meanwhile, timed, anywhere=anywhere)
        waited = stats.stall_seconds + residents.waited - stalled
        stats.overhead_seconds += time.perf_counter() - began - waited - computed

    def _look_ahead(self, layer: int, ids: Int32) -> None:
        """Let the prefetcher see a layer's routing, while its reads are under way."""
        if self.prefetcher is None:
            return
        if len(ids) > 1:
            self.prefetcher.routed_many(layer, ids)
            return
        if self._hidden is not None:
            self.prefetcher.predictor.see(layer, self._hidden)
        self.prefetcher.routed(layer, ids[0])


def count_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor | None, int]:
    """The token ids of a forward's arguments, where they are there, and how many tokens it evaluates."""
    ids = args[0] if args else kwargs.get("input_ids")
    if ids is not None:
        return ids, ids.numel()
    rows, length, _ = kwargs["inputs_embeds"].shape
    return None, rows * length
