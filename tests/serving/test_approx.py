"""Approximate routing where llama.cpp's server evaluates: compiled code answers, and every layer's tokens are seen."""

from __future__ import annotations

from pathlib import Path

import pytest

import flashmoe
from flashmoe.engines.base import SamplingParams
from flashmoe.engines.llamacpp.library import Library

PROMPT = "The old man went down to the harbour"
GREEDY = SamplingParams(temperature=0)
N = 24


@pytest.mark.parametrize("cache", ["40%", "100%"])
def test_every_decoded_token_is_seen(cache: str, demo: Path, lib: Library) -> None:
    with flashmoe.load(
        demo, library=lib, threads=1, cache=cache, prefetch="none", approx="cache:0.5+drop:1"
    ) as model:
        for _ in range(2):
            "".join(model.generate(PROMPT, max_tokens=N, sampling=GREEDY))
        rewritten, decoded = model.rewritten, model.telemetry.decode.tokens
        assert rewritten is not None
        assert decoded >= N
        assert rewritten.tokens == len(model.catalog.layers) * decoded
        assert rewritten.routed == rewritten.tokens * model.catalog.top_k
        everything_is_there = cache == "100%" and model.cache.stats["decode"].misses == 0
        assert (rewritten.replaced > 0) == (not everything_is_there or rewritten.replaced > 0)
        if cache == "40%":
            assert rewritten.replaced > 0
            assert rewritten.dropped > 0
        said = [
            line for line in model.report().lines() if line.startswith("approximate (cache:0.5+drop:1): ")
        ]
        assert len(said) == 1
        assert model.stats["approximate"]["replaced"] == rewritten.replaced


def test_exactly(demo: Path, lib: Library) -> None:
    """For a request that asks for it the routing is the model's own, and afterwards it is not."""
    options = {"library": lib, "threads": 1, "cache": "25%", "prefetch": "none"}
    with flashmoe.load(demo, **options) as model:  # type: ignore[arg-type]
        assert model.rewritten is None
        assert model.stats["approximate"] == {}
        with model.exactly():
            expected = "".join(model.generate(PROMPT, max_tokens=N, sampling=GREEDY))
    with flashmoe.load(demo, approx="cache:5+drop:1", **options) as model:  # type: ignore[arg-type]
        other = "".join(model.generate(PROMPT, max_tokens=N, sampling=GREEDY))
        before = model.rewritten
        with model.exactly(), model.exactly():
            assert "".join(model.generate(PROMPT, max_tokens=N, sampling=GREEDY)) == expected
        after = model.rewritten
        assert before is not None
        assert after is not None
        assert (after.replaced, after.dropped) == (before.replaced, before.dropped)
        assert other != expected
        "".join(model.generate(PROMPT, max_tokens=N, sampling=GREEDY))
        assert model.rewritten is not None
        assert model.rewritten.replaced > before.replaced
