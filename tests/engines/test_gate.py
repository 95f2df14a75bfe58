"""The routers that the hook reads out of the graph are the model's own, and prefetching with them works."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashmoe
from flashmoe.cache.stats import CacheStats
from flashmoe.engines.llamacpp.library import Library
from flashmoe.prefetch.base import Float32, Int32
from flashmoe.prefetch.gate import Gate
from flashmoe.prefetch.scheduler import Prefetcher
from tests.conftest import Tiny
from tests.models import make


class Spy(Gate):
    """Applies each layer's router to that very layer's hidden state: it must choose what the engine chose."""

    def __init__(self) -> None:
        super().__init__()
        self.right = self.asked = 0

    def begin_step(self, token: int) -> None:
        super().begin_step(token)
        self._seen = -1

    def compiled(self) -> None:
        """All calls come in Python."""

    def use_residency(self, slot_of: Int32) -> None:
        """All experts are scored, as if none were resident."""

    def see(self, layer: int, hidden: Float32) -> None:
        super().see(layer, hidden)
        self._seen = layer
        self._out = np.zeros(self.n_experts, np.float32)
        super().predict(layer, layer, self._out)

    def observe(self, layer: int, ids: Int32) -> None:
        if self.routers and self._seen == layer:
            chosen = set(np.argsort(-self._out)[: len(ids)].tolist())
            self.right += len(chosen & set(ids.tolist()))
            self.asked += len(ids)


# softmax; a bias on the logits; sigmoid with a bias on the choice; norms of other names, or none
ROUTERS = [
    "llama",
    "olmoe",
    "qwen2moe",
    "qwen3moe",
    "gpt-oss",
    "deepseek2-lite",
    "glm4moe",
    "granitemoe",
    "phimoe",
    "minimax-m2",
    "jamba",
]


def check_routers(path: Path, lib: Library) -> None:
    with flashmoe.load(path, cache="100%", threads=1, n_ctx=64, prefetch="none", library=lib) as model:
        spy = Spy()
        spy.bind(len(model.catalog.layers), model.catalog.n_experts, model.catalog.top_k)
        model.engine.prefetch(Prefetcher([spy], model.cache))
        for token in range(3, 15):
            model.engine.decode([token])
    # from the first token on
    assert spy.asked == 12 * len(model.catalog.layers) * model.catalog.top_k
    assert spy.right >= 0.99 * spy.asked


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_are_read_right(name: str, tiny: Tiny, lib: Library) -> None:
    check_routers(tiny(name), lib)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_routers_of_half_the_size_are_read_as_they_are(kind: str, tmp_path: Path, lib: Library) -> None:
    check_routers(make("qwen3moe", tmp_path / "m.gguf", router=kind), lib)


@pytest.mark.parametrize("prefetch", ["gate", "auto"])
def test_demo_prefetches_what_is_then_asked_for(prefetch: str, demo: Any, lib: Library) -> None:
    tokens: Sequence[int] = range(100, 160)

    def run(prefetch: str) -> tuple[flashmoe.Model, bytes]:
        with flashmoe.load(
            "demo", cache="40%", policy="lru", threads=1, n_ctx=128, prefetch=prefetch, library=lib
        ) as model:
            model.cache.phase = "decode"
            for token in tokens:
                model.engine.decode([token])
            return model, model.engine.logits().tobytes()

    plain, expected = run("none")
    ahead, logits = run(prefetch)
    assert logits == expected
    counted, alone = ahead.cache.stats["decode"], plain.cache.stats["decode"]
    assert counted.requests == alone.requests
    through = counted.prefetch_hits + counted.late_hits
    assert through > 0.04 * alone.misses  # few are certain enough: it is a small model
    assert counted.wasted_bytes < counted.prefetch_bytes


@pytest.mark.parametrize("n", [2, 9])
def test_a_short_first_prompt_finds_experts_read_ahead(n: int, demo: Any, lib: Library) -> None:
    def run(prefetch: str) -> tuple[CacheStats, bytes]:
        with flashmoe.load(
            "demo", cache="40%", threads=1, n_ctx=64, prefetch=prefetch, library=lib, learn=False
        ) as model:
            tokens = model.engine.tokenize("What is a mixture of experts, and how is it run?")[:n]
            model.decoder.evaluate(tokens, decode=False)
            return model.cache.stats["prefill"], model.engine.logits().tobytes()

    plain, expected = run("none")
    ahead, logits = run("gate")
    assert logits == expected
    assert ahead.requests == plain.requests
    through = ahead.prefetch_hits + ahead.late_hits
    assert through > plain.late_hits + 0.3 * plain.misses
