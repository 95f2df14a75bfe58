"""What every engine does between a layer's router and its experts, and how long that takes.

A layer's routing is recorded, its experts are made resident, and while their reads are under way the prefetcher sees
the routing and reads ahead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.common.signals import SafeLock
from flashmoe.errors import warn
from flashmoe.prefetch.scheduler import CompiledTurn, Prefetcher
from flashmoe.routing.recorder import RoutingObserver

Int32 = NDArray[np.int32]
Slots = TypeVar("Slots")


class Residents(Protocol):
    """What makes experts resident: an ExpertCache, or tiers above it."""

    @property
    def waited(self) -> float:
        """Seconds waited so far, the cache's `stall_seconds` aside."""

    def begin_step(self, tokens: int, top_k: int) -> None:
        """See `ExpertCache.begin_step`."""


class LayerStep:
    """One graph after the other: `begin`, then `record` and `serve` for each layer."""

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        #: The cache in RAM, whose phase and counters are the engine's.
        self.cache: ExpertCache | None = None
        #: What `begin` announces steps to; the cache, where nothing is above it.
        self.residents: Residents | None = None
        self.recorder: RoutingObserver | None = None
        self.prefetcher: Prefetcher | None = None
        #: Called with (layer, ids [tokens, top_k]) to put other experts in place of the router's.
        self.override: Callable[[int, Int32], None] | None = None
        self._asked: Prefetcher | None = None  # in the present graph
        self._single = False  # whether it is of one token
        self._lock = SafeLock()

    @property
    def observed(self) -> bool:
        """Whether the routing is recorded or replaced."""
        return self.recorder is not None or self.override is not None

    @property
    def predicts(self) -> bool:
        """Whether the prefetcher sees the present graph."""
        return self._asked is not None

    @property
    def compiled(self) -> CompiledTurn | None:
        """What compiled code may call for the prefetcher, in the present graph of one token."""
        return self._asked.compiled if self._asked is not None and self._single else None

    def read_ahead(self, layer: int) -> None:
        """Compiled code has served a layer: see to what was prefetched for it and is to be for the next."""
        assert self.cache is not None
        self.cache.served(layer)
        if (asked := self._asked) is not None:
            self.ask(lambda: asked.read_ahead(layer))

    def begin(self, tokens: Sequence[int]) -> None:
        """A graph of `tokens` begins, ids or -1 where only their number is known."""
        assert self.cache is not None
        (self.residents or self.cache).begin_step(len(tokens), self._top_k)
        if self.cache.policy.needs_ranking:
            self.cache.policy.begin_step(tokens)
        self._tell(lambda recorder: recorder.begin_step())
        # several sequences decoded together ask the next layer for too many experts to guess them
        self._single = len(tokens) == 1
        together = not self._single and self.cache.phase == "decode"
        self._asked = None if together or min(tokens, default=-1) < 0 else self.prefetcher
        if (asked := self._asked) is not None:
            self.ask(lambda: asked.begin_step(tokens))

    def end(self) -> None:
        """The graph has been computed, or has failed."""
        if self.cache is not None:
            self.cache.end_step()

    def record(self, layer: int, ids: Int32, weights: Callable[[], NDArray[np.float32]]) -> None:
        """The router of a layer has picked `ids`, int32 [tokens, top_k], with `weights` of the same shape."""
        self._tell(lambda recorder: recorder.add(layer, ids, weights()))

    def _tell(self, what: Callable[[RoutingObserver], None]) -> None:
        recorder = self.recorder  # another thread may take it away
        if recorder is None:
            return
        if failed := self._failure(lambda: what(recorder)):
            self.recorder = None
            warn(f"recording of the routing has ended: {failed}", 3)

    def _failure(self, call: Callable[[], None]) -> Exception | None:
        """What `call` has raised: an evaluation does not fail because it is looked at.

        What a signal's handler raises is no failure of it, and comes afterwards.
        """
        with self._lock:
            try:
                call()
            except Exception as error:
                return error
        return None

    def ask(self, call: Callable[[], None]) -> None:
        """Call the prefetcher, whose predictors may be a user's own."""
        if failed := self._failure(call):
            self._asked = self.prefetcher = None
            warn(f"prefetching has ended: {failed}")

    def serve(
        self,
        layer: int,
        ids: Int32,
        ensure: Callable[[Callable[[], None] | None], Slots],
        hidden: Callable[[], NDArray[np.float32] | None],
        computed: Callable[[], float] = lambda: 0.0,
    ) -> Slots:
        """Make a layer's experts resident; returns what `ensure` does.

        ensure: takes what to call while reads are under way. hidden: the router's input, float32 [tokens, n], where it
        is known. computed: seconds that `ensure` has spent computing with the experts.
        """
        assert self.cache is not None
        stats, residents, asked = self.cache.stats[self.cache.phase], self.residents, self._asked

        def look_ahead() -> None:
            assert asked is not None
            if len(ids) > 1:
                asked.routed_many(layer, ids, hidden)
                return
            if (seen := hidden()) is not None:
                asked.predictor.see(layer, seen[0])
            asked.routed(layer, ids[0])

        meanwhile = None if asked is None else lambda: self.ask(look_ahead)
        began = time.perf_counter()
        waited = stats.stall_seconds + (residents.waited if residents else 0.0)
        slots = ensure(meanwhile)
        waited = stats.stall_seconds + (residents.waited if residents else 0.0) - waited
        stats.overhead_seconds += time.perf_counter() - began - waited - computed()
        return slots
