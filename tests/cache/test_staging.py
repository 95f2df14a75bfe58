"""Prefetching: the right bytes wherever a prefetched expert goes, and a policy that does not notice."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashmoe
from flashmoe.cache import sizing
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.policies import create
from flashmoe.cache.residency import check_residency
from flashmoe.engines.llamacpp.library import Library
from flashmoe.errors import ReadError
from flashmoe.storage import reader as reader_module
from flashmoe.storage.aio import ThreadQueue
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.gguf import read_gguf
from tests.cache.test_expert_cache import Checked, failing, sector
from tests.conftest import Tiny


class Staged(Checked):
    """A cache over a tiny model with `spare` slots for prefetching in every size group."""

    def __init__(self, path: Path, slots: int, spare: int, policy: str = "lru") -> None:
        super().__init__(path, slots, policy)
        groups = max(self.catalog.groups) + 1
        self.policy = create(policy)
        self.policy.bind(sizing.residency_for(self.catalog, [slots] * groups, [spare] * groups))
        self.cache = ExpertCache(self.pool, self.reader, self.policy, [spare] * groups)
        self.spare = spare * groups

    def check(self, layer: int, experts: list[int], slots: list[int]) -> None:
        assert self.cache.staging is not None
        spare = self.cache.staging.slots
        assert len(set(spare)) == len(spare) == self.spare
        residency = self.policy.residency
        assert all(residency.owner[slot] < 0 for slot in spare)
        super().check(layer, experts, slots)

    def check_residency(self) -> None:
        check_residency(self.policy.residency, self.cache.staging.slots if self.cache.staging else ())

    def settle(self) -> None:
        """Let every prefetch end."""
        while self.reader._under_way or self.reader._prefetch:
            self.reader.poll()


@pytest.fixture(autouse=True, scope="module")
def plain_reads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "open_queue", ThreadQueue)
        yield


def test_prefetched_expert_is_a_hit_and_reads_nothing(tiny: Tiny) -> None:
    c = Staged(tiny("gpt-oss"), 12, 3)
    c.cache.prefetch(0, [4, 5])
    c.settle()
    with failing(Path("any"), [(0, 1 << 60)]):
        c.ensure(0, [4, 5])
    stats = c.cache.stats["prefill"]
    assert (stats.hits, stats.prefetch_hits, stats.late_hits, stats.misses) == (2, 2, 0, 0)
    assert stats.prefetch_bytes == 2 * c.catalog.layers[0].expert_bytes
    assert stats.bytes == 0
    c.ensure(0, [4, 5, 6])
    assert stats.misses == 1
    c.close()


def test_unfinished_prefetch_is_a_late_hit(tiny: Tiny) -> None:
    c = Staged(tiny("gpt-oss"), 12, 3)
    c.cache.prefetch(0, [4])  # not looked at before `ensure` asks for it
    c.reader._queue.depth = 0  # nothing starts from here on
    c.cache.prefetch(0, [4, 5])
    c.reader._queue.depth = 4
    c.ensure(0, [5, 7])
    stats = c.cache.stats["prefill"]
    assert (stats.late_hits, stats.misses) == (1, 1)
    c.close()


def test_experts_that_only_larger_layers_have_are_no_guesses(tiny: Tiny) -> None:
    c = Staged(tiny("gpt-oss"), 12, 3)
    c.pool.n_experts[1] = 5
    c.cache.prefetch(1, [7, 4, 5])
    assert list(c.cache.staging._staged[1]) == [4]
    c.close()


def test_wrong_guesses_evict_nothing_and_are_counted(tiny: Tiny) -> None:
    c = Staged(tiny("gpt-oss"), 12, 2)
    before = [c.policy.residency.resident(layer).tolist() for layer in range(2)]
    for guess in range(0, 8, 2):
        c.cache.prefetch(1, [guess, guess + 1])
        c.settle()
        c.ensure(1, [11])
        c.cache.prefetch(0, [guess])
        c.settle()
        c.ensure(0, [11])
    assert before == [[], []]
    assert c.policy.residency.resident(0).tolist() == c.policy.residency.resident(1).tolist() == [11]
    assert c.cache.stats["prefill"].wasted_bytes > 0
    c.close()


def test_dropped_prefetches_are_counted_and_logged(
    demo: Path, lib: Library, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "flashmoe"),
        flashmoe.load(demo, cache="50%", threads=1, n_ctx=64, prefetch="table", library=lib) as model,
    ):
        cache = model.cache
        cache.prefetch(1, np.flatnonzero(cache.policy.residency.slot_of[1] < 0)[:2].tolist())
        cache.staging.served(1)  # its router wanted others; nobody has looked whether the reads have ended
        assert cache.staging.dropped == 2
        assert not caplog.messages[-1].startswith("prefetches dropped")
    assert caplog.messages[-1] == "prefetches dropped before their end: 2"


def test_failed_prefetch_is_read_again_and_reported_then(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    c = Staged(tiny("gpt-oss"), 12, 2)
    with failing(Path("m"), [sector(c, 0, 4, 0)]):
        c.cache.prefetch(0, [4, 5])
        c.settle()
        with pytest.raises(ReadError, match="bad sector"):
            c.ensure(0, [4, 5])
        c.check_residency()
        assert not len(c.policy.residency.resident(0))
    assert caplog.messages == ["a prefetch of expert 4 of layer 0 failed: reading it on demand"]
    c.ensure(0, [4, 5])
    c.close()


steps = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.lists(st.integers(0, 11), min_size=1, max_size=4, unique=True),
        st.lists(st.integers(0, 11), max_size=4, unique=True),
        st.booleans(),
    ),
    max_size=30,
)


@settings(max_examples=40)
@given(steps=steps, policy=st.sampled_from(["lru", "lfu-aged", "arc"]), spare=st.integers(1, 4))
def test_policy_does_not_notice(
    steps: list[tuple[int, list[int], list[int], bool]], policy: str, spare: int, tiny: Tiny
) -> None:
    """Any guesses: bytes are right, and the experts that stay are those that stay without prefetching."""
    path = tiny("gpt-oss")
    c = Staged(path, 12 + spare, spare, policy)
    plain = Checked(path, 12, policy)
    for layer, experts, guesses, settle in steps:
        absent = [e for e in guesses if c.policy.residency.slot_of[layer, e] < 0]
        c.cache.prefetch(layer, absent)
        if settle:
            c.settle()
        c.ensure(layer, experts)
        plain.ensure(layer, experts)
        for index in range(len(c.catalog.layers)):
            ours, theirs = c.policy.residency, plain.policy.residency
            assert ours.resident(index).tolist() == theirs.resident(index).tolist()
    counted, alone = c.cache.stats["prefill"], plain.cache.stats["prefill"]
    assert counted.requests == alone.requests
    assert counted.hits - counted.prefetch_hits == alone.hits
    c.close()
    plain.close()


def test_spare_slots_are_a_small_share(tiny: Tiny) -> None:
    catalog = ExpertCatalog.from_gguf(read_gguf(tiny("olmoe")))
    groups = max(catalog.groups) + 1
    assert (
        sizing.spare_slots(catalog, [catalog.total_experts] * groups) == [0] * groups
    )  # nothing to prefetch
    assert sizing.spare_slots(catalog, [catalog.top_k] * groups) == [0] * groups
    large = replace(catalog, layers=catalog.layers * 40)
    for spare in sizing.spare_slots(large, [large.total_experts // groups // 2] * groups):
        assert 0 < spare <= sizing.SPARE


def test_cache_without_spare_slots_ignores_prefetches(tiny: Tiny) -> None:
    c = Checked(tiny("gpt-oss"), 12)
    c.cache.prefetch(0, [1, 2])
    c.ensure(0, [1, 2])
    assert c.cache.stats["prefill"].misses == 2
    assert np.all(c.policy.residency.owner[:2] >= 0)
    c.close()
