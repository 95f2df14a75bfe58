"""Prefill: the right bytes whatever a micro-batch asks for, shares that survive it, and slots that all come back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.cache.kernels.loops import window_size
from flashmoe.cache.policies import create
from flashmoe.cache.residency import make_residency
from flashmoe.errors import ReadError
from flashmoe.storage import reader as reader_module
from flashmoe.storage.aio import ThreadQueue
from tests.cache.test_expert_cache import failing, sector
from tests.cache.test_staging import Staged
from tests.conftest import Tiny

EXPERTS, TOP_K, LAYERS = 12, 2, 4  # of the tiny model
size = window_size


@pytest.fixture(autouse=True, scope="module")
def plain_reads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "open_queue", ThreadQueue)
        yield


class Prefilled(Staged):
    """A cache that is given whole steps, and checked after each layer."""

    def step(self, tokens: list[list[int]], phase: str = "prefill") -> None:
        """Evaluate tokens; token t asks layer l for its experts shifted by l."""
        self.cache.phase = phase
        ids = np.array(tokens, np.int32)
        self.cache.begin_step(len(ids), ids.shape[1])
        for layer in range(len(self.catalog.layers)):
            shifted = (ids + layer) % EXPERTS
            slots = self.cache.ensure(layer, shifted)
            self.check(layer, shifted.ravel().tolist(), slots.tolist())

    def check(self, layer: int, experts: list[int], slots: list[int]) -> None:
        res = self.policy.residency
        outside = self.cache.staging.slots + self.cache._window._passing
        assert len(set(outside)) == len(outside) == self.spare + res.window_count.sum()
        assert all(res.owner[slot] < 0 for slot in outside)
        super(Staged, self).check(layer, experts, slots)

    def check_residency(self) -> None:
        """What no policy owns is free, lent, or spare: `check` has counted the last two."""
        res = self.policy.residency
        assert (
            res.owner >= 0
        ).sum() + res.free_count.sum() + res.window_count.sum() + self.spare == res.n_slots
        assert (res.quota + res.lent).sum() == res.n_slots - self.spare
        for layer in range(res.n_layers):
            assert (res.slot_of[layer] >= 0).sum() == res.used[layer]


@contextmanager
def prefilled(path: Path, slots: int, spare: int = 0, policy: str = "lru") -> Iterator[Prefilled]:
    made = Prefilled(path, slots, spare, policy)
    try:
        yield made
    finally:
        made.close()


tokens = st.lists(
    st.lists(st.integers(0, EXPERTS - 1), min_size=TOP_K, max_size=TOP_K, unique=True), min_size=1
)


@settings(max_examples=60)
@given(
    steps=st.lists(tokens, max_size=8),
    policy=st.sampled_from(["lru", "lfu-aged", "arc"]),
    spare=st.integers(0, 3),
    slots=st.integers(16, 40),
)
def test_any_steps(steps: list[list[list[int]]], policy: str, spare: int, slots: int, tiny: Tiny) -> None:
    """Bytes are right, no slot is lost, and what stays is what a replay of the same steps leaves."""
    with prefilled(tiny("gpt-oss"), slots + spare, spare, policy) as c:
        for step in steps:
            c.step(step)
        c.cache.begin_step(1, TOP_K)
        stats = c.cache.stats["prefill"]
        res = c.policy.residency
        assert not res.window_count.any()
        ids = np.array([token for step in steps for token in step], np.int16).reshape(-1, 1, TOP_K)
        ids = (ids + np.arange(LAYERS)[:, np.newaxis]) % EXPERTS
        first = np.cumsum([0, *map(len, steps)])
        replayed = create(policy)
        replayed.bind(make_residency(LAYERS, EXPERTS, res.quota, res.group))
        counts = replayed.replay(ids.reshape(-1, LAYERS, TOP_K), first, np.zeros(len(steps)))
        assert stats.requests == counts.requests.sum()
        assert stats.hits + stats.late_hits + stats.misses == stats.requests
        for layer in range(LAYERS):
            assert res.resident(layer).tolist() == replayed.residency.resident(layer).tolist()


@settings(max_examples=60)
@given(
    steps=st.lists(st.tuples(tokens, st.sampled_from(["prefill", "decode"])), max_size=8),
    policy=st.sampled_from(["lru", "lfu-aged", "arc"]),
    spare=st.integers(0, 3),
    slots=st.integers(16, 40),
)
def test_prompts_between_batches(
    steps: list[tuple[list[list[int]], str]], policy: str, spare: int, slots: int, tiny: Tiny
) -> None:
    """Bytes are right and no slot is lost where sequences are decoded together between prompts."""
    with prefilled(tiny("gpt-oss"), slots + spare, spare, policy) as c:
        for step, phase in steps:
            c.step(step, phase)
            if phase == "decode" and len(step) * TOP_K <= slots:
                assert not c.policy.residency.window_count.any()


def test_sequences_decoded_together_take_from_other_layers_what_a_share_lacks(tiny: Tiny) -> None:
    with prefilled(tiny("gpt-oss"), 16) as c:
        residency = c.policy.residency
        shares = residency.quota.copy()
        four = [[0, 1], [2, 3], [4, 5], [6, 7]]
        assert max(shares[residency.group == 0]) < 8  # what four ask for
        c.step(four, "decode")
        assert residency.used[LAYERS - 1] == 8
        assert (residency.quota == shares).all()
        c.step(four[:2], "decode")
        c.step(four[:2], "decode")
        assert (residency.used <= shares).all()  # given back where shares suffice
        hits = c.cache.stats["decode"].hits
        c.step(four[:2], "decode")
        assert c.cache.stats["decode"].hits == hits + 4 * LAYERS


def test_prompt_reads_every_expert_once_and_spares_the_shares(tiny: Tiny) -> None:
    with prefilled(tiny("gpt-oss"), 32) as c:
        everything = [[e, e + 1] for e in range(0, EXPERTS, 2)]
        c.step(everything)
        stats = c.cache.stats["prefill"]
        assert stats.requests == LAYERS * EXPERTS
        assert stats.bytes + stats.prefetch_bytes == sum(
            EXPERTS * layer.expert_bytes for layer in c.catalog.layers
        )
        assert stats.prefetch_hits + stats.late_hits > 0  # layers after the first were read ahead
        assert stats.wasted_bytes == 0
        c.cache.begin_step(1, TOP_K)
        assert c.policy.residency.used.min() >= 3  # of a share of 8, less what was lent


def test_failed_read_in_a_prompt_leaves_nothing_wrong(tiny: Tiny) -> None:
    with prefilled(tiny("gpt-oss"), 24, 2) as c:
        everything = [[e, e + 1] for e in range(0, EXPERTS, 2)]
        with failing(Path("m"), [sector(c, 2, 5, 0)]), pytest.raises(ReadError, match="bad sector"):
            c.step(everything)
        c.step(everything)
        c.step([[1, 2]])
        assert not c.policy.residency.window_count.any()


@given(
    slots=st.integers(1, 600),
    layers=st.integers(1, 20),
    experts=st.integers(1, 64),
    k=st.integers(1, 8),
    n=st.integers(1, 600),
)
def test_window_holds_a_layer_and_leaves_a_token_s(
    slots: int, layers: int, experts: int, k: int, n: int
) -> None:
    window = size(slots, layers, experts, k, n)
    if window:
        assert min(experts, n * k) <= window <= slots - k
    else:
        assert n == 1 or slots >= layers * experts or min(experts, n * k) > slots - k
