"""Properties that every eviction policy must have, and exact models of the simple ones."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.cache.policies import BUILTIN, EvictionPolicy, create
from flashmoe.cache.residency import check_residency, equal_quota, exchange, make_residency
from flashmoe.errors import PolicyError

NEEDS_FILE = {"flashmoe", "flashmoe+"}
PLAIN = [name for name in BUILTIN if name not in NEEDS_FILE]
ONLINE = [name for name in PLAIN if name != "belady"]


@st.composite
def traces(draw: Any, max_tokens: int = 40) -> Any:
    """(ids [T, L, k] of distinct experts, n_experts, slots per layer >= k, starts [T])."""
    n_experts = draw(st.integers(3, 9))
    n_layers = draw(st.integers(1, 3))
    k = draw(st.integers(1, min(3, n_experts - 1)))
    slots = draw(st.integers(k, n_experts))
    tokens = draw(st.integers(1, max_tokens))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    skew = rng.dirichlet(np.full(n_experts, 0.6), n_layers)
    keys = -np.log(rng.random((tokens, n_layers, n_experts))) / (skew + 1e-9)
    ids = np.argsort(keys, axis=2)[:, :, :k].astype(np.int16)
    starts = (rng.random(tokens) < 0.2).astype(np.uint8)
    starts[0] = 1
    return ids, n_experts, slots, starts


def bound(
    name: str, n_layers: int, n_experts: int, slots: int, partition: str = "per-layer", **options: Any
) -> EvictionPolicy:
    policy = create(name, **options)
    quota = equal_quota(slots * n_layers, n_layers, n_experts)
    policy.bind(make_residency(n_layers, n_experts, quota, partition=partition))
    return policy


def one_by_one(policy: EvictionPolicy, ids: Any, starts: Any, check: bool = False) -> Any:
    """Drive `access` as the runtime does; hit bits [T, L, k]."""
    res = policy.residency
    n_tokens, n_layers, k = ids.shape
    slots_out, miss_expert, miss_slot = (np.full(k, -9, np.int32) for _ in range(3))
    hit = np.zeros(ids.shape, bool)
    for t in range(n_tokens):
        if starts[t]:
            policy.begin_sequence()
        for layer in range(n_layers):
            want = ids[t, layer].astype(np.int32)
            before = res.slot_of[layer, want].copy()
            m = policy.access(layer, want, slots_out, miss_expert, miss_slot)
            hit[t, layer] = before >= 0
            assert m == (before < 0).sum()
            assert sorted(miss_expert[:m]) == sorted(want[before < 0])
            assert (slots_out[before >= 0] == before[before >= 0]).all()  # hits stay where they are
            assert (res.slot_of[layer, want] == slots_out).all()
            assert (res.slot_of[layer, miss_expert[:m]] == miss_slot[:m]).all()
            if check:
                check_residency(res)
                assert (res.used <= res.quota).all() or res.partition[0] == 1
    return hit


@pytest.mark.parametrize("partition", ["per-layer", "global"])
@pytest.mark.parametrize("name", ONLINE)
@given(case=traces())
@settings(max_examples=25)
def test_replay_is_access_one_by_one(name: str, partition: str, case: Any) -> None:
    ids, n_experts, slots, starts = case
    hit = one_by_one(bound(name, ids.shape[1], n_experts, slots, partition), ids, starts, check=True)
    replay = bound(name, ids.shape[1], n_experts, slots, partition).replay(ids, starts=starts, want_bits=True)
    assert ((replay.bits == 2) == hit).all()
    assert (replay.hits == hit.sum(axis=2)).all()
    assert replay.requests.sum() == ids.size


@given(case=traces())
@settings(max_examples=100)
def test_lru_is_an_ordered_dict(case: Any) -> None:
    ids, n_experts, slots, starts = case
    hit = one_by_one(bound("lru", ids.shape[1], n_experts, slots), ids, starts)
    for layer in range(ids.shape[1]):
        cache: OrderedDict[int, None] = OrderedDict()
        for t in range(len(ids)):
            now = set(ids[t, layer].tolist())
            assert hit[t, layer].tolist() == [e in cache for e in ids[t, layer].tolist()]
            for e in sorted(now & set(cache)):
                del cache[e]
            while len(cache) + len(now) > slots:
                cache.popitem(last=False)
            for e in sorted(now):
                cache[e] = None


@given(case=traces())
@settings(max_examples=100)
def test_lfu_is_a_counter_with_recency(case: Any) -> None:
    ids, n_experts, slots, starts = case
    hit = one_by_one(bound("lfu", ids.shape[1], n_experts, slots), ids, starts)
    for layer in range(ids.shape[1]):
        count, last = [0] * n_experts, [0] * n_experts
        cache: set[int] = set()
        for t in range(len(ids)):
            if starts[t]:
                count = [0] * n_experts
            now = ids[t, layer].tolist()
            assert hit[t, layer].tolist() == [e in cache for e in now]
            for e in now:
                count[e], last[e] = count[e] + 1, t + 1
            for e in now:
                if e not in cache:
                    if len(cache) == slots:
                        cache.remove(min(cache - set(now), key=lambda e: (count[e], last[e], e)))
                    cache.add(e)


@pytest.mark.parametrize("name", ONLINE)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_random_use_keeps_the_pool_consistent(name: str, seed: int) -> None:
    """Micro-batches, exchanged slots, failed reads, size groups: the arrays never contradict each other."""
    rng = np.random.default_rng(seed)
    n_layers, n_experts = 4, 8
    group = [0, 1, 0, 1]
    quota = rng.integers(2, 5, n_layers).astype(np.int32)
    partition = "global" if seed % 2 else "per-layer"
    policy = create(name)
    policy.bind(make_residency(n_layers, n_experts, quota, group, partition, spare=[1, 2]))
    res = policy.residency
    ends = res.group_start[1:].tolist()
    spare = [[ends[0] - 1], [ends[1] - 2, ends[1] - 1]]
    policy.begin_sequence()
    for _ in range(60):
        layer = int(rng.integers(n_layers))
        action = rng.integers(4)
        if action == 0 and res.used[layer]:
            moved, mine = int(res.resident(layer)[-1]), spare[group[layer]]
            taken = mine.pop(0)
            mine.append(exchange(res, layer, moved, taken))
            assert res.slot_of[layer, moved] == taken
        elif action == 1 and res.used[layer]:
            gone = int(res.resident(layer)[0])
            policy.release(layer, gone)
            assert res.slot_of[layer, gone] < 0
        else:
            ids = rng.integers(-1, n_experts, rng.integers(1, 12)).astype(np.int32)
            slots_out, miss_expert, miss_slot = (np.zeros(12, np.int32) for _ in range(3))
            before = res.slot_of.copy()
            m = policy.access(layer, ids, slots_out, miss_expert, miss_slot)
            wanted = np.unique(ids[ids >= 0])
            if m < 0:
                assert (res.slot_of == before).all()
            else:
                assert m == (before[layer, wanted] < 0).sum()
                assert (res.slot_of[layer, wanted] >= 0).all()
                assert (slots_out[: len(ids)][ids >= 0] == res.slot_of[layer, ids[ids >= 0]]).all()
        check_residency(res, spare[0] + spare[1])


def test_prefill_borrows_and_gives_back() -> None:
    policy = bound("lru", 3, 8, 4)
    res = policy.residency
    out = [np.zeros(8, np.int32) for _ in range(3)]
    for layer in range(3):
        assert policy.access(layer, np.arange(4, dtype=np.int32), *out) == 4
    assert (
        policy.access(1, np.arange(8, dtype=np.int32), *out) == 4
    )  # double its quota: borrows from the one behind
    assert res.used.tolist() == [0, 8, 4]
    assert (
        policy.access(0, np.arange(2, dtype=np.int32), *out) == 2
    )  # below quota: takes from layer 1, above quota
    assert res.used.tolist() == [2, 6, 4]
    check_residency(res)


def test_too_many_experts_at_once() -> None:
    policy = bound("lru", 1, 8, 4)
    out = [np.zeros(8, np.int32) for _ in range(3)]
    assert policy.access(0, np.arange(5, dtype=np.int32), *out) == -1
    assert (policy.residency.owner == -1).all()
    assert policy.access(0, np.arange(4, dtype=np.int32), *out) == 4
    with pytest.raises(PolicyError, match="raise the capacity"):
        policy.replay(np.arange(5, dtype=np.int16).reshape(1, 1, 5))


@pytest.mark.parametrize("name", ONLINE)
def test_warm_start(name: str) -> None:
    rng = np.random.default_rng(1)
    ids = rng.permuted(np.tile(np.arange(8, dtype=np.int16), (60, 2, 1)), axis=2)[:, :, :2]
    warm, cold = bound(name, 2, 8, 4), bound(name, 2, 8, 4)
    warm.replay(ids[:30])
    for a, b in zip(cold.residency, warm.residency, strict=True):
        a[...] = b
    cold.load_state(warm.state())
    go_on = np.zeros(30, np.uint8)
    assert (cold.replay(ids[30:], starts=go_on).hits == warm.replay(ids[30:], starts=go_on).hits).all()
    with pytest.raises(PolicyError, match="saved state"):
        cold.load_state({})


def test_unknown_names_and_options() -> None:
    with pytest.raises(PolicyError, match="unknown policy 'lrru'.*lru"):
        create("lrru")
    with pytest.raises(PolicyError, match="does not exist"):
        create("lru:/nowhere/file.safetensors")
    with pytest.raises(PolicyError, match="decay"):
        create("lru", decay=2)
    with pytest.raises(PolicyError, match="not bound"):
        _ = create("lru").residency


def test_a_layers_slots_lie_together() -> None:
    """Layers of two size groups fill their shares in turns; then one expert after the other fails, and others come."""
    quota, groups = np.array([3, 5, 2, 6, 4]), [0, 1, 0, 0, 1]
    own = [range(0, 3), range(11, 16), range(3, 5), range(5, 11), range(16, 20)]
    policy = create("lru")
    policy.bind(make_residency(5, 8, quota, groups))
    out = np.zeros((3, 1), np.int32)
    for expert in range(8):
        for layer in range(5):
            if expert < quota[layer]:
                policy.access(layer, np.array([expert], np.int32), *out)
    residency = policy.residency
    for layer in range(5):
        assert sorted(residency.slot_of[layer, : quota[layer]]) == list(own[layer])
    freed = [policy.release(layer, 1) for layer in range(5)]
    for layer in reversed(range(5)):
        policy.access(layer, np.array([7], np.int32), *out)
        assert residency.slot_of[layer, 7] == freed[layer]


def test_a_layer_beyond_its_share_takes_the_nearest_slots() -> None:
    policy = create("lru")
    policy.bind(make_residency(5, 8, np.full(5, 2), partition="per-layer"))
    ids, out = np.arange(4, dtype=np.int32), np.zeros((3, 4), np.int32)
    policy.access(2, ids, *out)
    assert sorted(policy.residency.slot_of[2, :4]) in ([3, 4, 5, 6], [4, 5, 6, 7], [2, 3, 4, 5])
