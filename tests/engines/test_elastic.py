"""A pool whose slots come and go while it computes: the logits are those of one whose slots stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

import flashmoe
from flashmoe.cache import sizing
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.policies.base import CompiledRequest
from flashmoe.cache.residency import check_residency
from flashmoe.engines.llamacpp.library import Library
from tests.cache.test_elastic import unused
from tests.conftest import Tiny
from tests.engines.reference import CONTEXT, evaluate, prompt


def sizes(cache: ExpertCache, least: int) -> Iterator[list[int]]:
    """Slots of each size group, at random; all of them now and then."""
    rng = np.random.default_rng(3)
    while True:
        yield [int(rng.integers(min(least, most), most + 1)) for most in cache.elastic.most]
        yield list(cache.elastic.most)


def between_steps(model: flashmoe.Model, resize: Callable[[], None]) -> None:
    model.cache.before_step = resize


def between_layers(model: flashmoe.Model, resize: Callable[[], None]) -> None:
    """Called while a layer's experts are chosen, before they are made resident."""
    model.engine.override_routing(lambda layer, ids: resize() if layer % 2 else None)


def within_steps(model: flashmoe.Model, resize: Callable[[], None]) -> None:
    """Called as another thread may: when a step has begun whose experts compiled code looks for."""
    cache, compiled = model.cache, model.cache.compiled_request

    def begun(n: int) -> CompiledRequest | None:
        resize()
        cache.on_resize()
        return compiled(n)

    cache.compiled_request = begun  # type: ignore[method-assign]


@pytest.mark.parametrize("when", [between_steps, between_layers, within_steps])
@pytest.mark.parametrize("name", ["olmoe", "gpt-oss", "qwen3moe"])
@pytest.mark.parametrize("prefetch", ["none", "table"])
def test_logits_stay(
    name: str,
    when: Callable[[flashmoe.Model, Callable[[], None]], None],
    prefetch: str,
    tiny: Tiny,
    lib: Library,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sizing, "_MOST_SPARE", 0.2)  # small pools have none otherwise
    runs, seen = [], set()
    for elastic in (False, True):
        with flashmoe.load(
            tiny(name),
            cache="80%",
            n_ctx=CONTEXT,
            n_ubatch=2,
            threads=1,
            all_logits=True,
            prefetch=prefetch,
            library=lib,
        ) as model:
            if elastic:
                least = sizing.SPARE + model.catalog.top_k * model.engine.n_ubatch
                wanted = sizes(model.cache, least)

                def resize(cache: ExpertCache = model.cache, wanted: Iterator[list[int]] = wanted) -> None:
                    seen.add(sum(cache.elastic.slots))
                    cache.resize(next(wanted))

                when(model, resize)
            forced = runs[0].decoded if runs else None
            runs.append(evaluate(model.engine, prompt(model.engine.n_vocab), 2, forced))
            residency = model.cache.policy.residency
            check_residency(residency, [*model.cache.staging.slots, *unused(model.cache)])
            assert (model.prefetcher is not None) == (prefetch != "none")
    assert len(seen) > 2
    assert (runs[0].logits.view(np.int32) == runs[1].logits.view(np.int32)).all()


def test_before_the_next_layer_of_a_token(tiny: Tiny, lib: Library) -> None:
    """Also where every expert is resident, and layers need no Python: memory that is wanted cannot wait for a token."""
    with flashmoe.load(
        tiny("olmoe"), cache="100%", n_ctx=CONTEXT, threads=1, prefetch="none", library=lib
    ) as model:
        cache, wanted = model.cache, [8, 9, 10, 11]
        for token in range(12, 44):
            model.engine.decode([token])
        within_steps(model, lambda: cache.resize(wanted))
        model.engine.decode([12])
        assert cache.elastic.slots == wanted
