"""Joins a model's forwards to cache, recorder and prefetcher: what happens before, in and after the experts' layers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.engines.layer_step import LayerStep
from flashmoe.engines.transformers.rewriting import RouteRewriter
from flashmoe.engines.transformers.slots import Each, Residents, Weights
from flashmoe.errors import FlashMoEError

Int32 = NDArray[np.int32]


class Routing:
    """Implements `experts.Residence`. `begin` comes before every forward of the model."""

    def __init__(self, top_k: int) -> None:
        #: Records, replaces and predicts the routing.
        self.step = LayerStep(top_k)
        self._residents: Residents | None = None
        self._hidden: torch.Tensor | None = None
        #: Where decoded tokens' routes are rewritten.
        self.rewriter: RouteRewriter | None = None
        #: Whether the forward under way is to end; see `interrupt`.
        self.stop = False

    def interrupt(self) -> None:
        """Let the forward under way end at its next layer; from any thread."""
        self.stop = True

    def open(self, cache: ExpertCache, residents: Residents) -> None:
        """Experts come from `residents`; `cache` is the one in RAM, whose phase and counters are the engine's."""
        self.step.cache, self.step.residents, self._residents = cache, residents, residents

    def close(self) -> None:
        """There are no experts any more."""
        self.step.cache = self.step.residents = self._residents = None

    @property
    def cache(self) -> ExpertCache:
        """The cache in RAM. Raises FlashMoEError after `close`."""
        if self.step.cache is None:
            raise FlashMoEError("this model was closed: load it again")
        return self.step.cache

    @property
    def residents(self) -> Residents:
        """Where experts come from. Raises FlashMoEError after `close`."""
        if self._residents is None:
            raise FlashMoEError("this model was closed: load it again")
        return self._residents

    def begin(self, tokens: torch.Tensor | None, count: int) -> None:
        """A forward of `count` tokens begins; their ids, where they are known."""
        assert self.residents
        self.step.begin([-1] * count if tokens is None else tokens.reshape(-1).tolist())

    def see(self, hidden: torch.Tensor) -> None:
        """What the next layer's router has seen, [tokens, n]."""
        if self.step.predicts:
            self._hidden = hidden.detach()

    def _seen(self) -> NDArray[np.float32] | None:
        """What the router has seen, float32 [tokens, n], on the CPU: copied only where it is asked for."""
        if self._hidden is None:
            return None
        seen: NDArray[np.float32] = self._hidden.to("cpu", torch.float32).numpy()
        return seen.reshape(-1, seen.shape[-1])

    def route(
        self, layer: int, ids: Int32, hidden: torch.Tensor, weights: torch.Tensor
    ) -> tuple[Int32, torch.Tensor]:
        if self.stop:
            raise FlashMoEError("the evaluation was interrupted")
        if self.step.override is not None:
            ids = ids.copy()
            self.step.override(layer, ids)
        elif self.rewriter is not None and self.cache.phase == "decode":
            return self.rewriter(layer, ids, hidden, weights)
        return ids, weights

    @property
    def computes(self) -> bool:
        return self.residents.computes

    def ensure(
        self, layer: int, ids: Int32, weights: torch.Tensor | None, each: Each, *, anywhere: bool
    ) -> None:
        computed = 0.0

        def timed(expert: int, slot: Weights) -> None:
            nonlocal computed
            start = time.perf_counter()
            each(expert, slot)
            computed += time.perf_counter() - start

        def ensure(meanwhile: Callable[[], None] | None) -> None:
            seen_before = weights is None
            self.residents.ensure(
                layer,
                ids,
                meanwhile if meanwhile and not seen_before else lambda: None,
                timed,
                anywhere=anywhere,
            )

        if weights is not None:
            self.step.record(layer, ids, weights.detach().to("cpu", torch.float32).numpy)
        self.step.serve(layer, ids, ensure, self._seen, lambda: computed)


def count_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor | None, int]:
    """The token ids of a forward's arguments, where they are there, and how many tokens it evaluates."""
    ids = args[0] if args else kwargs.get("input_ids")
    if ids is not None:
        return ids, ids.numel()
    rows, length, _ = kwargs["inputs_embeds"].shape
    return None, rows * length
