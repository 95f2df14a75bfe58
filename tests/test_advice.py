"""What a report says held a run up, and what it expects of more memory."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.advice import LEAST_TOKENS, advise, more_ram
from flashmoe.cache.policies import create
from flashmoe.cache.recent import IDS, RecentRouting
from flashmoe.cache.residency import make_residency
from tests.simulate.traces import made_up

EXPERTS = 16
RUN: dict[str, Any] = {
    "bound": "ssd", "tokens": 100, "seconds": 10.0, "stall_seconds": 6.0, "read_bytes": 12e9, "ceiling": 2.5,
    "slots": 256, "experts": 1024, "layers": 16, "expert_bytes": 4 << 20, "misses": lambda slots: 64 - slots,
}  # fmt: skip


def noted(ids: np.ndarray) -> RecentRouting:
    """All of ids [T, L, k] noted."""
    recent = RecentRouting(ids.shape[1], EXPERTS)
    for step in ids.astype(np.int32):
        for layer, experts in enumerate(step):
            recent.add(layer, experts)
    return recent


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), tokens=st.integers(1, 300), slots=st.integers(3, EXPERTS))
def test_misses_are_those_of_lru(seed: int, tokens: int, slots: int) -> None:
    """The simulator's LRU at every size, whose first uses are misses at all of them.

    Ids of one token are all pinned there, so distances within a token do not matter: a token's experts fit.
    """
    ids = made_up(tokens, 2, EXPERTS, 1, seed).expert_ids
    policy = create("lru")
    policy.bind(make_residency(2, EXPERTS, [slots] * 2))
    replayed = policy.replay(ids)
    first_uses = sum(len(np.unique(ids[:, layer])) for layer in range(2))
    assert noted(ids).misses(slots) == (replayed.requests - replayed.hits).sum() - first_uses


def test_misses_between_whole_slots_and_with_all() -> None:
    recent = noted(made_up(200, 2, EXPERTS, 2).expert_ids)
    few, more = recent.misses(4), recent.misses(5)
    assert few > more > 0
    assert recent.misses(4.5) == pytest.approx((few + more) / 2)
    assert recent.misses(EXPERTS) == recent.misses(EXPERTS + 7.5) == 0


def test_only_the_last_requests_count() -> None:
    recent = RecentRouting(1, EXPERTS)
    for _ in range(IDS):
        recent.add(0, np.array([0, 1, 2], np.int32))
    assert recent.misses(2) > 0
    for _ in range(2 * IDS):
        recent.add(0, np.array([5], np.int32))
    assert recent.misses(1) <= 2  # a remainder at the ring's end
    recent.add(0, np.zeros(IDS + 1, np.int32))  # more than fits is left out


def test_ssd_bound() -> None:
    advice = advise(**RUN)
    assert advice.no_reads_tokens_per_s == pytest.approx(25)  # 40 ms of computing
    assert advice.faster_drive_tokens_per_s == pytest.approx(1 / 0.07)
    assert advice.more_ram_bytes == 512 << 20  # 128 slots: 8 more per layer, of 48 misses 40 are left
    assert advice.more_ram_tokens_per_s == pytest.approx(1 / (0.04 + 0.06 * 40 / 48))
    assert advice.sentence == (
        "ssd-bound: 60% of the time stalled, 2.0 of 2.5 GB/s reached; +512 MiB of RAM would give about 11.1 tokens/s, "
        "a drive twice as fast 14.3, all experts in memory 25.0"
    )


def test_other_bounds() -> None:
    assert "lower --ram" in advise(**{**RUN, "bound": "memory"}).sentence
    hidden = advise(**{**RUN, "bound": "compute", "stall_seconds": 1.0})
    assert re.match(r"compute-bound: 10% .* more memory would give at most 11\.1 tokens/s", hidden.sentence)
    assert advise(**{**RUN, "tokens": LEAST_TOKENS - 1}).sentence.endswith(
        "31 tokens are too few to say more"
    )
    assert "no token" in advise(**{**RUN, "tokens": 0, "seconds": 0.0, "stall_seconds": 0.0}).sentence
    idle = advise(**{**RUN, "bound": "compute", "stall_seconds": 0.0, "read_bytes": 0.0})
    assert idle.sentence.startswith(
        "compute-bound: 0% of the time stalled; more memory would give at most 10.0"
    )
    assert "RAM" not in advise(**{**RUN, "slots": 1024}).sentence  # all experts have a slot
    assert "RAM" not in advise(**{**RUN, "misses": lambda _: 0}).sentence  # nothing was asked for twice


def test_more_ram_is_a_round_size() -> None:
    gib = 1 << 30
    assert more_ram(gib, 100 * gib) == gib // 2
    assert more_ram(7 * gib, 100 * gib) == 2 * gib
    assert more_ram(7 * gib, gib) == gib
