"""Approximate routing in the llama.cpp engine: exact where nothing is asked for, and where all is resident."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import flashmoe
from flashmoe.engines.llamacpp.library import Library
from flashmoe.errors import ModelError, UsageError
from flashmoe.runtime.model import Model
from tests.conftest import Tiny
from tests.engines.reference import PROMPT_TOKENS, Run, evaluate, prompt

EVERYTHING = "cache:10+drop:1"  # whatever can be replaced or left out is
#: One architecture of each way to choose experts: softmax with and without a norm; sigmoid, bias, groups and scale; the
#: softmax last; two of few; and those that are refused.
TRAITS = ("olmoe", "qwen3moe", "deepseek2", "gpt-oss", "llama", "llama4", "grovemoe", "deepseek4")
OTHERS = {"llama4": "one expert", "grovemoe": "does not know", "deepseek4": "does not know"}


class Seen:
    """An observer that keeps ids and weights of every layer, as the products have them."""

    def __init__(self) -> None:
        self.ids: list[tuple[int, NDArray[Any]]] = []
        self.weights: list[NDArray[Any]] = []

    def begin_step(self) -> None:
        """See RoutingObserver."""

    def add(self, layer: int, ids: NDArray[Any], weights: NDArray[Any] | None = None) -> None:
        assert weights is not None
        self.ids.append((layer, ids.copy()))
        self.weights.append(weights.copy())


def run(
    path: Path, lib: Library, forced: Sequence[int] | None = None, seen: Seen | None = None, **options: Any
) -> tuple[Run, Model]:
    given = {"threads": 1, "n_ctx": 64, "prefetch": "none", "all_logits": True} | options
    with flashmoe.load(path, library=lib, **given) as model:
        if seen:
            model.engine.record(seen)
        tokens = prompt(model.engine.n_vocab)

        class Phases:
            """The engine, told what is a prompt."""

            def decode(self, tokens: Sequence[int]) -> None:
                model.cache.phase = "prefill" if model.engine.past() < PROMPT_TOKENS else "decode"
                model.engine.decode(tokens)

            def logits(self, index: int = -1) -> NDArray[np.float32]:
                return model.engine.logits(index)

        return evaluate(Phases(), tokens, model.engine.n_ubatch, forced), model


@pytest.mark.parametrize("name", TRAITS)
def test_every_architecture(name: str, lib: Library, tiny: Tiny) -> None:
    """With a boost of 0 nothing changes; with the largest, prompts do not, and nothing but the first J is read."""
    path = tiny(name)
    exact, _ = run(path, lib, cache="60%")
    if name in OTHERS:
        with pytest.raises((ModelError, UsageError), match=OTHERS[name]):
            run(path, lib, exact.decoded, cache="60%", approx=EVERYTHING)
        return
    same, _ = run(path, lib, exact.decoded, cache="60%", approx="cache:0+drop:0")
    assert np.array_equal(same.logits.view(np.int32), exact.logits.view(np.int32))
    seen = Seen()
    other, model = run(path, lib, exact.decoded, seen, cache="60%", approx=EVERYTHING)
    before = slice(0, PROMPT_TOKENS)
    assert np.array_equal(other.logits[before].view(np.int32), exact.logits[before].view(np.int32))
    assert np.isfinite(other.logits).all()
    for _, ids in seen.ids:
        assert all(len(set(row)) == len(row) for row in ids.tolist())
    rewritten = model.rewritten
    assert rewritten is not None
    assert rewritten.routed == len(exact.decoded) * sum(layer.top_k for layer in model.catalog.layers)
    # all but the first expert of a token come from the pool
    assert model.cache.stats["decode"].misses <= len(model.catalog.layers) * len(exact.decoded)
    assert rewritten.replaced + rewritten.dropped > 0
