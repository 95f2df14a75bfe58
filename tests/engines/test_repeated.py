"""A decoded token is announced in short where nothing has changed since the last one; and what has changed is seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import flashmoe
from flashmoe.engines.layer_step import LayerStep
from flashmoe.engines.llamacpp.library import Library
from flashmoe.routing.approximation import Approximation
from flashmoe.routing.rewrite import Rewriter
from tests.conftest import Tiny
from tests.engines.reference import CONTEXT


class Seen:
    """The layers that come, for whom they come."""

    def __init__(self) -> None:
        self.layers: set[int] = set()

    def enter(self, layer: int) -> None:
        self.layers.add(layer)

    def leave(self) -> None: ...

    def begin_step(self) -> None: ...

    def add(self, layer: int, *_: Any) -> None:
        self.layers.add(layer)


@pytest.fixture
def model(lib: Library, tiny: Tiny) -> Iterator[flashmoe.Model]:
    """After a few tokens, each announced."""
    with flashmoe.load(
        tiny("olmoe"), cache="100%", prefetch="none", n_ctx=CONTEXT, threads=1, library=lib
    ) as model:
        for token in (1, 2, 3):
            model.decoder.evaluate([token], decode=True)
        yield model


def test_in_short(model: flashmoe.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(LayerStep, "begin")  # of what is announced in full
    stats, before = model.cache_stats["decode"], model.cache_stats["decode"].requests
    model.decoder.evaluate([4], decode=True)
    top_k = model.catalog.top_k
    assert stats.requests - before == top_k * len(model.catalog.layers)
    assert model.cache.recent.tokens == 4


def test_observers_see_the_next_token(model: flashmoe.Model) -> None:
    layers = set(range(len(model.catalog.layers)))
    waiting, recorded, chosen = Seen(), Seen(), Seen()
    model.cache.observer = waiting
    model.decoder.evaluate([4], decode=True)
    model.cache.observer = None
    model.decoder.evaluate([5], decode=True)
    model.engine.record(recorded)
    model.decoder.evaluate([6], decode=True)
    model.engine.record(None)
    model.decoder.evaluate([7], decode=True)
    model.engine.override_routing(lambda layer, _: chosen.enter(layer))
    model.decoder.evaluate([8], decode=True)
    assert [waiting.layers, recorded.layers, chosen.layers] == [layers] * 3


def test_a_prompt_of_one_token_is_none_of_the_text(model: flashmoe.Model) -> None:
    noted = model.cache.recent.at.copy()
    model.decoder.evaluate([4], decode=False)
    assert np.array_equal(model.cache.recent.at, noted)
    assert model.cache_stats["prefill"].requests


def test_routes_are_rewritten_from_the_next_token_on(model: flashmoe.Model) -> None:
    layers, experts = len(model.catalog.layers), model.catalog.n_experts
    rewriter = Rewriter(Approximation("cache:1", boost=1), layers, experts, model.catalog.top_k)
    model.engine.approximate(rewriter)  # type: ignore[attr-defined]
    model.decoder.evaluate([4], decode=True)
    assert rewriter.rewritten.routed == layers * model.catalog.top_k
