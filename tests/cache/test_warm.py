"""A warm start: whatever is brought back, asked for, evicted or failing meanwhile, the bytes are right."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.cache import warm
from flashmoe.cache.policies import BUILTIN, create
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.residency import admit, check_residency, make_residency, take_free_slot
from flashmoe.errors import PolicyError, ReadError
from flashmoe.storage import reader as reader_module
from flashmoe.storage.aio import ThreadQueue
from tests.cache.test_expert_cache import Checked, failing
from tests.conftest import Tiny

ONLINE = [n for n in BUILTIN if n not in ("belady", "flashmoe", "flashmoe+")]


@pytest.fixture(autouse=True, scope="module")
def plain_reads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "open_queue", ThreadQueue)
        yield


class Warm(Checked):
    def check_residency(self) -> None:
        with self.cache._lock:
            check_residency(self.policy.residency, self.cache.warm.slots if self.cache.warm else ())

    def close(self) -> None:
        self.cache.close()
        self.check_residency()
        super().close()


@contextmanager
def checked(path: Path, slots: int, policy: str = "lru") -> Iterator[Warm]:
    with closing(Warm(path, slots, policy)) as made:
        yield made


def ranked(c: Checked, rows: list[list[int]]) -> np.ndarray:
    table = np.full((len(c.catalog.layers), c.catalog.n_experts), -1, np.int32)
    for layer, row in enumerate(rows):
        table[layer, : len(row)] = row
    return table


def start(c: Checked, rows: list[list[int]]) -> warm.WarmStart:
    c.cache.warm_start(ranked(c, rows))
    assert c.cache.warm
    return c.cache.warm


def ended(running: warm.WarmStart) -> None:
    for _ in range(5000):
        if not running.running:
            return
        time.sleep(0.001)
    raise AssertionError("it does not end")


def residents(c: Checked) -> list[list[int]]:
    return [c.policy.residency.resident(layer).tolist() for layer in range(len(c.catalog.layers))]


def test_experts_are_read_in_the_background(tiny: Tiny) -> None:
    with checked(tiny("gpt-oss"), 16) as c:  # 4 layers of 12 experts in two size groups; biases
        rows = [[3, 1, 2], [5], [], [7, 0]]
        running = start(c, rows)
        ended(running)
        assert residents(c) == [sorted(row) for row in rows]
        with failing(Path("any"), [(0, 1 << 60)]):
            for layer, row in enumerate(rows):
                if row:
                    c.ensure(layer, row)
        stats = c.cache.stats["prefill"]
        assert (stats.hits, stats.misses, stats.bytes) == (6, 0, 0)
        assert running.experts == 6
        assert running.bytes == sum(c.catalog.layers[n].expert_bytes * len(r) for n, r in enumerate(rows))


def test_a_smaller_pool_takes_the_best(tiny: Tiny) -> None:
    with checked(tiny("olmoe"), 4) as c:
        ended(start(c, [[9, 8, 7, 6, 5], [1], [], [2, 3, 4, 5, 6, 7]]))
        assert residents(c) == [[6, 7, 8, 9], [1], [], [2, 3, 4, 5]]
        c.check_residency()


def test_the_best_of_all_layers_come_first(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "_UNDER_WAY", 1)  # one at a time
    monkeypatch.setattr(warm, "_PAUSE", 3600)
    with checked(tiny("gpt-oss"), 20) as c:
        running = start(c, [[3, 1], [], [5, 4], [7]])
        came: list[list[list[int]]] = []
        while running._go_on():
            c.reader.wait(running._under_way[0].ticket)
            came.append(residents(c))
        assert came[1:] == [
            [[3], [], [], []],
            [[3], [], [5], []],
            [[3], [], [5], [7]],
            [[1, 3], [], [5], [7]],
        ]


def test_a_demand_needs_the_slots(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is under way gives way to a request that takes the whole pool, and is tried again later."""
    monkeypatch.setattr(warm, "_PAUSE", 3600)
    with checked(tiny("olmoe"), 4) as c:
        running = start(c, [[9, 8, 7, 6], [], [], []])
        running._go_on()
        assert len(running.slots) == 4
        c.ensure(0, [0, 1, 2, 9])
        assert not running.slots
        running._go_on()
        assert residents(c)[0] == [0, 1, 2, 9]
        assert running.experts == 0


def test_demanded_meanwhile(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "_PAUSE", 3600)
    with checked(tiny("olmoe"), 4) as c:
        running = start(c, [[9, 8], [], [], []])
        running._go_on()
        c.ensure(0, [9, 1])
        for arrival in running._under_way:
            c.reader.wait(arrival.ticket)
        running._go_on()
        assert residents(c)[0] == [1, 8, 9]
        assert running.experts == 1
        c.check_residency()
        c.ensure(0, [8, 9, 1])


def test_a_failed_read_is_nothing(tiny: Tiny) -> None:
    with checked(tiny("gpt-oss"), 16) as c:
        with failing(Path("any"), [(0, 1 << 60)]):
            running = start(c, [[3, 1], [5], [], []])
            ended(running)
            assert not any(residents(c))
            assert running.experts == running.bytes == 0
            with pytest.raises(ReadError):
                c.cache.ensure(0, np.array([3], np.int32))
        c.check_residency()
        c.ensure(0, [3, 1])


@settings(max_examples=40)
@given(data=st.data())
def test_any_start_and_any_requests(tiny: Tiny, data: st.DataObject) -> None:
    slots = data.draw(st.integers(4, 20), "slots")
    policy = data.draw(st.sampled_from(["lru", "lfu-aged", "arc"]), "policy")
    with checked(tiny("gpt-oss"), slots, policy) as c:
        n, layers = c.catalog.n_experts, len(c.catalog.layers)
        rows = data.draw(
            st.lists(st.lists(st.integers(0, n - 1), unique=True), min_size=layers, max_size=layers), "rows"
        )
        start(c, rows)
        for _ in range(data.draw(st.integers(0, 12))):
            layer = data.draw(st.integers(0, layers - 1))
            c.ensure(layer, data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=4)))
            if data.draw(st.booleans()):
                time.sleep(0.003)


def run(policy: EvictionPolicy, seed: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    out = [np.zeros(8, np.int32) for _ in range(3)]
    residency = policy.residency
    for step in range(steps):
        if step % 40 == 0:
            policy.begin_sequence()
        for layer in range(residency.n_layers):
            ids = (rng.zipf(1.6, 3) % residency.n_experts).astype(np.int32)
            assert policy.access(layer, ids, *out) >= 0


@pytest.mark.parametrize("name", ONLINE)
def test_ranking_is_the_order_of_eviction(name: str) -> None:
    policy = create(name)
    policy.bind(make_residency(3, 16, [5] * 3))
    run(policy, 0, 100)
    before, state = policy.residency.slot_of.copy(), policy.state()
    order = policy.ranking()
    assert (policy.residency.slot_of == before).all()
    assert all((policy.state()[key] == value).all() for key, value in state.items())
    for layer in range(3):
        experts = order[layer][order[layer] >= 0].tolist()
        assert sorted(experts) == policy.residency.resident(layer).tolist()
        if name == "lru":
            last = state["last"][layer][experts]
            assert (np.diff(last) <= 0).all()  # the most recent one is the last to go
    check_residency(policy.residency)


@pytest.mark.parametrize("name", ONLINE)
def test_a_policy_goes_on_as_if_it_had_never_stopped(name: str) -> None:
    first, second = create(name), create(name)
    for policy in (first, second):
        policy.bind(make_residency(3, 16, [5] * 3))
    run(first, 0, 100)
    ours, theirs = second.residency, first.residency
    ours.step[:], ours.accesses[:] = theirs.step, theirs.accesses
    second.load_state(first.state())
    for layer, experts in enumerate(first.ranking().tolist()):
        for expert in experts:
            if expert >= 0:
                admit(ours, layer, expert, take_free_slot(ours, layer))
    check_residency(ours)
    for policy in (first, second):
        run(policy, 1, 50)
    assert ((ours.slot_of >= 0) == (theirs.slot_of >= 0)).all()


@settings(max_examples=120)
@given(data=st.data())
def test_any_state_is_refused_or_works(data: st.DataObject) -> None:
    """What compiled code uses as an index is checked: no state that is taken makes a policy fail."""
    name = data.draw(st.sampled_from(ONLINE))
    policy = create(name)
    policy.bind(make_residency(3, 16, [5] * 3))
    run(policy, 0, 30)
    state = policy.state()
    key = data.draw(st.sampled_from(sorted(state)))
    array = state[key]
    where = data.draw(st.integers(0, array.size - 1))
    if array.dtype.kind == "f":
        numbers = st.floats(width=array.dtype.itemsize * 8)
        value: float = data.draw(
            st.sampled_from([np.inf, -np.inf, np.nan, np.finfo(array.dtype).max]) | numbers
        )
    else:
        info = np.iinfo(array.dtype)
        value = data.draw(st.sampled_from([info.min, info.max]) | st.integers(int(info.min), int(info.max)))
    array.ravel()[where] = value
    with suppress(PolicyError):
        policy.load_state(state)
    run(policy, 2, 30)
    check_residency(policy.residency)
