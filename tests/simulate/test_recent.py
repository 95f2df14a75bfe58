"""Hit rates of the last steps: the runtime's own count, and replays that start where it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import flashmoe
from flashmoe import Model
from flashmoe.cache.policies import create
from flashmoe.cache.residency import check_residency, make_residency
from flashmoe.engines.base import SamplingParams
from flashmoe.simulate import recent
from flashmoe.simulate.recent import BLOCK, Block, Comparison, RecentSteps, compare
from flashmoe.simulate.replay import replay
from tests.simulate.traces import made_up

PROMPT = "The history of the lighthouse begins with fires that were lit on the hills above the sea."


def generate(model: Model, n: int, seed: int) -> None:
    for _ in model.generate(PROMPT, max_tokens=n, sampling=SamplingParams(temperature=3, top_k=0, seed=seed)):
        pass


def result(blocks: list[Block], quota: np.ndarray) -> Comparison:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recent, "PIECE", 1000)
        *pieces, found = compare(blocks, quota)
    assert len(pieces) > 3
    assert not any(pieces)
    assert found
    return found


@pytest.mark.parametrize("prefetch", ["none", "gate"])
def test_replay_is_the_runtime(demo: Path, prefetch: str) -> None:
    """From an empty pool on, LRU's replay has the very hits of a runtime with LRU, prompts between them or not."""
    with flashmoe.load(demo, cache="25%", policy="lru", prefetch=prefetch, threads=1) as model:
        steps = RecentSteps(model.cache, model.catalog.top_k)
        quota = model.cache.policy.residency.quota.copy()
        model.engine.record(steps)
        for seed in range(3):
            generate(model, 60, seed)
        found = result(steps.blocks(), quota)
    assert found.tokens > 3 * BLOCK
    assert found.hit_rate == found.lru
    assert found.lru < found.belady < 1


def test_from_the_experts_that_were_there(demo: Path) -> None:
    """A ring that has forgotten its beginning starts from what was resident, and the oracle is still the best."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recent, "IDS", 100 * 8 * 4)
        with flashmoe.load(demo, cache="25%", policy="lfu", prefetch="none", threads=1) as model:
            steps = RecentSteps(model.cache, model.catalog.top_k)
            quota = model.cache.policy.residency.quota.copy()
            model.engine.record(steps)
            generate(model, 400, 1)
            blocks = steps.blocks()
            assert sum(block.trace.n_tokens for block in blocks) <= 100
            assert (blocks[0].resident.sum(axis=1) == quota).all()
            found = result(blocks, quota)
    assert found.tokens == 3 * BLOCK
    assert found.belady > max(found.hit_rate, found.lru)


def test_pieces_change_nothing() -> None:
    """The figures of the simulator in one go."""
    trace = made_up(tokens=300, layers=3, experts=16, k=2, seed=1)
    quota = np.full(3, 5, np.int32)
    found = result([Block(0.0, np.zeros((3, 16), np.bool_), trace, 0, 0)], quota)
    for name, rate in (("lru", found.lru), ("belady", found.belady)):
        assert rate == replay(trace, create(name), int(quota.sum())).hit_rate


@pytest.mark.parametrize("slots", [4, 6, 10])
def test_prompts_between(slots: int) -> None:
    """Decoding counts, not the prompts: there the oracle has more hits than LRU, and than Belady for all requests."""
    sizes = [size for _ in range(20) for size in (slots // 2, *[1] * 30)]
    steps = np.repeat(np.arange(len(sizes)), sizes)
    phase = (np.array(sizes) > 1).astype(np.uint8)
    trace = replace(made_up(tokens=len(steps), seed=slots), step=steps, phase=phase[steps])
    found = result([Block(0.0, np.zeros((3, 16), np.bool_), trace, 0, 0)], np.full(3, slots, np.int32))
    counted = replay(trace, create("belady"), 3 * slots)
    decode = phase == 0
    belady = counted.hits[decode].sum() / counted.requests[decode].sum()
    assert found.lru < belady <= found.belady


def test_pool_that_holds_some() -> None:
    resident = np.random.default_rng(3).random((4, 9)) < 0.4
    residency = recent._holding(make_residency(4, 9, np.full(4, 6, np.int32)), resident)
    check_residency(residency)
    assert ((residency.slot_of >= 0) == resident).all()


def test_a_prompt_at_the_end_takes_nothing_from_the_next_comparison() -> None:
    """It lends slots to its window; the shares that the comparison was given stay as they are."""
    steps = np.concatenate([np.arange(60), np.full(3, 60)])
    trace = replace(made_up(tokens=63), step=steps, phase=(steps == 60).astype(np.uint8))
    quota = np.full(3, 6, np.int32)
    found = [result([Block(0.0, np.zeros((3, 16), np.bool_), trace, 0, 0)], quota) for _ in range(2)]
    assert quota.tolist() == [6, 6, 6]
    assert (found[0].lru, found[0].belady) == (found[1].lru, found[1].belady)
