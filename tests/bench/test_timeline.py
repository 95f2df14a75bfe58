"""The time line of a token: it accounts for the whole time and every read, and leaves nothing behind."""

from __future__ import annotations

import pytest

from flashmoe import load
from flashmoe.bench.timeline import COMPUTE, DEMAND, PREFETCH, PYTHON, STALL, Timeline
from flashmoe.cache.stats import CacheStats
from flashmoe.engines.llamacpp.library import Library
from tests.conftest import Tiny


def test_time_and_reads_add_up(lib: Library, tiny: Tiny) -> None:
    with load(tiny("olmoe"), cache="25%", n_ctx=64, threads=1, prefetch="none", library=lib) as model:
        for token in range(8):
            model.engine.decode([token])
        stats = model.cache.stats["recorded"] = CacheStats()
        model.cache.phase = "recorded"
        timeline = Timeline(model.cache, model.catalog).record(lambda: model.engine.decode([9]))
        assert model.cache.observer is model.cache.reader.observer is None
        layers = len(model.catalog.layers)
    spans = timeline["spans"]
    engine = [span for span in spans if span["kind"] in (COMPUTE, PYTHON)]
    for one, following in zip(engine, engine[1:], strict=False):
        assert following["start_seconds"] == pytest.approx(one["end_seconds"], abs=1e-5)  # no gap, no overlap
    assert engine[0]["start_seconds"] == 0
    assert engine[-1]["end_seconds"] == timeline["token_seconds"]
    assert [span["layer"] for span in engine] == sorted(span["layer"] for span in engine)
    assert {span["layer"] for span in engine if span["kind"] == PYTHON} == set(range(layers))
    reads = [span for span in spans if span["kind"] == DEMAND]
    assert stats.misses > 0
    assert sum(span["read_bytes"] for span in reads) == stats.bytes
    assert not [span for span in spans if span["kind"] == PREFETCH]
    for layer in {span["layer"] for span in reads}:
        asked = next(s for s in spans if s["kind"] == PYTHON and s["layer"] == layer)
        assert all(
            span["start_seconds"] >= asked["start_seconds"] for span in reads if span["layer"] == layer
        )
    stalled = sum(span["end_seconds"] - span["start_seconds"] for span in spans if span["kind"] == STALL)
    assert 0 < stalled <= stats.stall_seconds


def test_an_error_leaves_nothing_behind(lib: Library, tiny: Tiny) -> None:
    def fail() -> None:
        raise RuntimeError

    with load(tiny("olmoe"), cache="25%", n_ctx=64, threads=1, library=lib) as model:
        timeline = Timeline(model.cache, model.catalog)
        with pytest.raises(RuntimeError):
            timeline.record(fail)
        assert model.cache.observer is model.cache.reader.observer is None
        model.engine.decode([1])
        assert not timeline.spans
