"""Slots that are given back and taken again: memory goes and comes, experts stay as the policy ranks them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from flashmoe.cache import prefault as prefaults
from flashmoe.cache import sizing
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.policies import create
from flashmoe.cache.pool import SlotPool, slot_bytes
from flashmoe.cache.prefault import Prefault
from flashmoe.cache.residency import centre, check_residency
from flashmoe.common.memory import status_bytes
from flashmoe.storage.addresses import absent_bytes, reserve, reserve_huge
from tests.cache.test_expert_cache import Checked
from tests.conftest import Tiny

TOP_K = 4


@pytest.fixture
def checked(tiny: Tiny) -> Iterator[Checked]:
    """gpt-oss, two size groups of 20 and 10 slots for 3 and 1 layers of 12 experts; with biases."""
    opened = Checked(tiny("gpt-oss"), [20, 10])
    yield opened
    opened.close()


def unused(cache: ExpertCache) -> list[int]:
    start = cache.policy.residency.group_start
    return [
        slot
        for group, (used, there) in enumerate(zip(cache.elastic.slots, cache.elastic.most, strict=True))
        for slot in range(int(start[group]) + used, int(start[group]) + there)
    ]


def test_what_stays_is_what_the_policy_ranks_highest(checked: Checked) -> None:
    cache, residency = checked.cache, checked.policy.residency
    for layer in range(4):
        for first in range(0, 12, 4):
            checked.ensure(layer, list(range(first, first + 4)))
    ranked = checked.policy.ranking()
    assert (residency.used[[0, 1, 3]].sum(), residency.used[2]) == (20, 10)
    cache.resize([12, 6])
    cache.begin_step(1, TOP_K)
    assert cache.elastic.slots == [12, 6]
    assert residency.quota.tolist() == sizing.shares(12, 3, 12, TOP_K).tolist()[:2] + [6, 4]
    check_residency(residency, unused(cache))
    assert max(slot for slot in residency.slot_of[[0, 1, 3]].ravel()) < 12
    for layer, quota in enumerate(residency.quota.tolist()):
        kept = sorted(ranked[layer, :quota].tolist())
        assert residency.resident(layer).tolist() == kept
        misses = cache.stats["prefill"].misses
        slots = cache.ensure(layer, np.array(kept, np.int32)).tolist()
        assert cache.stats["prefill"].misses == misses  # moved, not read again
        owner = dict(zip(kept, slots, strict=True))
        checked.check_residency = lambda: check_residency(residency, unused(cache))  # type: ignore[method-assign]
        checked.check(layer, kept, [owner[e] for e in kept])


def test_as_many_as_before_again(checked: Checked) -> None:
    cache, residency = checked.cache, checked.policy.residency
    quota, least_group = residency.quota.copy(), cache.served_together(TOP_K)
    cache.resize([4, 4])
    cache.begin_step(1, TOP_K)
    assert cache.served_together(TOP_K) == 1 < least_group
    cache.resize([20, 10])
    cache.begin_step(1, TOP_K)
    assert (residency.quota == quota).all()
    assert cache.served_together(TOP_K) == least_group
    assert residency.free_count.tolist() == [20, 10]
    for layer in (0, 1, 3):
        checked.ensure(layer, list(range(6)))
        lowest = centre(residency, layer) - int(quota[layer]) // 2
        assert sorted(residency.slot_of[layer, :6].tolist()) == list(
            range(lowest, lowest + 6)
        )  # lowest first


def test_while_a_prompt_is_read(checked: Checked) -> None:
    """Between two layers: what the window lends comes back, and is lent anew."""
    cache = checked.cache
    rng = np.random.default_rng(0)
    cache.begin_step(2, TOP_K)
    for slots in ([20, 10], [14, 9], [16, 10], [13, 8]):
        cache.resize(slots)
        for layer in range(4):
            ids = np.array([rng.choice(12, TOP_K, replace=False) for _ in range(2)], np.int32)
            found = cache.ensure(layer, ids).tolist()
            owner = dict(zip(ids.ravel().tolist(), found, strict=True))
            checked.check_residency = lambda: None  # type: ignore[method-assign]
            checked.check(layer, list(owner), list(owner.values()))
            assert max(found) < slots[checked.catalog.groups[layer]]
        assert cache.elastic.slots == slots
    cache.begin_step(1, TOP_K)
    check_residency(checked.policy.residency, unused(cache))


def test_nothing_moves_where_late_bytes_may_arrive(checked: Checked) -> None:
    """A read that was given up, as a drive hung, may still end."""
    cache, reader = checked.cache, checked.reader
    reader._given_up[0] = cache.pool.reads(0, 0, 19)[0]
    cache.resize([12, 6])
    cache.begin_step(1, TOP_K)
    cache.ensure(0, np.arange(4, dtype=np.int32))
    assert cache.elastic.slots == [20, 10]
    del reader._given_up[0]
    cache.begin_step(1, TOP_K)
    assert cache.elastic.slots == [12, 6]


def test_memory_goes_and_comes(tiny: Tiny) -> None:
    checked = Checked(tiny("hunyuan-moe"), 1)
    slots = 2048
    groups = max(checked.catalog.groups) + 1
    pool = SlotPool(checked.catalog, [slots] * groups, checked.reader)
    policy = create("lru")
    policy.bind(sizing.residency_for(checked.catalog, [slots] * groups))
    cache = ExpertCache(pool, checked.reader, policy)
    each = sum(slot_bytes(checked.catalog, max(file.align for file in checked.reader.files)))
    assert slots * each > 32 << 20
    pool.prefault()
    pool._prefault.join()
    assert pool.absent == 0
    whole = status_bytes("RssAnon")
    cache.resize([slots // 4] * groups)
    cache.begin_step(1, 1)
    freed = whole - status_bytes("RssAnon")
    assert 0.95 * slots * 3 / 4 * each < freed < 1.05 * slots * 3 / 4 * each
    assert pool.absent == 0  # of those in use
    cache.resize([slots] * groups)
    cache.begin_step(1, 1)
    pool._prefault.join()
    assert pool.absent == 0
    assert abs(status_bytes("RssAnon") - whole) < 4 << 20
    pool.close()
    checked.close()


def test_prefault_stops_at_its_bound_and_goes_on_where_it_stopped() -> None:
    nbytes = 24 << 20
    held = [reserve_huge(nbytes), reserve(nbytes)]
    prefault = Prefault([(address, nbytes) for _, address in held])
    assert prefault.absent == 2 * nbytes
    prefault.bound(1, (5 << 20) + 100)
    prefault.start()
    prefault.join()
    assert [absent_bytes(address, nbytes) for _, address in held] == [0, (19 << 20) - 4096]
    prefault.bound(1, nbytes)
    prefault.bound(0, 1 << 20)
    assert prefault.absent == (19 << 20) - 4096
    prefault.start()
    prefault.join()
    assert prefault.absent == 0
    left = absent_bytes(held[0][1], nbytes)
    assert left in (23 << 20, 22 << 20)  # the system may make the huge page whole again that was cut
    prefault.close()


def test_prefault_rests_while_reads_are_far_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the priority of every other thread, and works as long as reads come near."""
    monkeypatch.setattr(prefaults, "_LEAD", 8 << 20)
    priorities, steps = set(), []

    def commit(address: int, nbytes: int) -> bool:
        priorities.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        steps.append((address, nbytes))
        return True

    monkeypatch.setattr(prefaults, "commit", commit)
    prefault = Prefault([(1 << 30, 64 << 20), (2 << 30, 16 << 20)])
    assert not prefault.far_ahead
    for _ in range(2):
        assert prefault._go_on()
    assert prefault.far_ahead  # 4 MiB of each
    prefault.reach(1, 1 << 20)
    assert not prefault.far_ahead
    assert prefault._go_on()
    assert prefault.far_ahead
    prefault.reach(1, 16 << 20)
    while not prefault.far_ahead:
        assert prefault._go_on()
    assert sum(nbytes for address, nbytes in steps if address >= 2 << 30) == 16 << 20
    prefault.reach(0, 64 << 20)
    prefault.start()
    prefault.join()
    assert sum(nbytes for _, nbytes in steps) == 80 << 20
    assert priorities == {os.getpriority(os.PRIO_PROCESS, 0)}


def test_prefault_does_not_rest_while_nothing_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefaults, "_LEAD", 4 << 20)
    monkeypatch.setattr(prefaults, "_RESTS", 1e9)  # for ever
    steps = []
    monkeypatch.setattr(prefaults, "commit", lambda address, nbytes: steps.append(nbytes) or True)
    prefault = Prefault([(1 << 30, 64 << 20)])
    prefault.start()
    assert prefault._thread is not None
    prefault._thread.join(0.1)
    assert prefault._thread.is_alive()
    prefault.idle = lambda: True
    prefault.join()
    assert sum(steps) == 64 << 20


def test_reads_say_how_far_they_have_come(checked: Checked) -> None:
    pool = checked.pool
    lead = pool._prefault._lead
    assert pool._prefault._reached == [0] * len(pool.regions)
    checked.ensure(2, [1, 2, 3])  # of the second size group
    strides = [stride for _, stride in pool._strides[1]]
    first = len(pool._strides[0])
    assert pool._prefault._reached[first:] == [3 * stride for stride in strides]
    assert set(pool._prefault._reached[:first]) == {0}
    assert lead >= 2 << 20
    checked.ensure(2, [2])
    assert pool._prefault._reached[first] == 3 * strides[0]
    pool.use(1, 2)
    assert pool._prefault._reached[first] == 2 * strides[0]


def test_absent_bytes() -> None:
    """What was touched is present, what was not is absent, to the page."""
    memory, address = reserve(1 << 20)
    assert absent_bytes(address, 1 << 20) == 1 << 20
    memory[8192] = 1
    assert absent_bytes(address, 1 << 20) == (1 << 20) - 4096
