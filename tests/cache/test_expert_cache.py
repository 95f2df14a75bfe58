"""`ensure`: the right bytes in every slot that it returns, whatever was asked for before and whatever failed."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.cache import sizing
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.policies import create
from flashmoe.cache.pool import SlotPool
from flashmoe.cache.residency import check_residency
from flashmoe.errors import BudgetError, ReadError
from flashmoe.storage import reader as reader_module
from flashmoe.storage.aio import ThreadQueue
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.direct import DirectFile
from flashmoe.storage.gguf import read_gguf
from flashmoe.storage.reader import ExpertReader, Ticket
from tests.conftest import Tiny


@pytest.fixture(autouse=True, scope="module")
def plain_reads() -> Iterator[None]:
    """Reads through DirectFile.read_enclosing, which can be made to fail; the kernel's queue has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "open_queue", ThreadQueue)
        yield


@cache
def experts_of(path: Path) -> tuple[ExpertCatalog, dict[str, list[bytes]]]:
    """Where a model's experts are, and the bytes of each by the tensor's name, as another reader of the format says."""
    catalog = ExpertCatalog.from_gguf(read_gguf(path))
    names = {weight.tensor.name for layer in catalog.layers for weight in (*layer.weights, *layer.tables)}
    found = {t.name: t.data for t in gguf.GGUFReader(path).tensors if t.name in names}
    return catalog, {name: [np.ascontiguousarray(e).tobytes() for e in data] for name, data in found.items()}


class Checked:
    """A cache over a tiny model, and the model's bytes to compare with."""

    def __init__(self, path: Path, slots: int | list[int], policy: str = "lru") -> None:
        self.catalog, self.experts = experts_of(path)
        self.reader = ExpertReader(self.catalog.gguf.files)
        groups = max(self.catalog.groups) + 1
        counts = [slots] * groups if isinstance(slots, int) else slots
        self.pool = SlotPool(self.catalog, counts, self.reader)
        self.policy = create(policy)
        self.policy.bind(sizing.residency_for(self.catalog, counts))
        self.cache = ExpertCache(self.pool, self.reader, self.policy)

    def ensure(self, layer: int, experts: list[int]) -> list[int]:
        """Ask, and check everything that an engine relies on."""
        slots = self.cache.ensure(layer, np.array(experts, np.int32)).tolist()
        self.check(layer, experts, slots)
        return slots

    def check(self, layer: int, experts: list[int], slots: list[int]) -> None:
        assert len(slots) == len(experts)
        owner = dict(zip(experts, slots, strict=True))
        assert [owner[e] for e in experts] == slots  # the same expert, the same slot
        assert len(set(owner.values())) == len(owner)  # different experts, different slots
        for expert, slot in owner.items():
            for window in (*self.pool.windows[layer], *self.pool.tables(layer)):
                there = ctypes.string_at(window.address + slot * window.stride, window.weight.nbytes)
                assert there == self.experts[window.weight.tensor.name][expert], (window.weight, expert, slot)
        self.check_residency()

    def check_residency(self) -> None:
        check_residency(self.policy.residency)

    def close(self) -> None:
        self.pool.close()
        self.reader.close()


@contextmanager
def checked(path: Path, slots: int | list[int], policy: str = "lru") -> Iterator[Checked]:
    made = Checked(path, slots, policy)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def failing(path: Path, ranges: list[tuple[int, int]]) -> Iterator[None]:
    """Reads that begin in one of the byte ranges raise ReadError."""
    read = DirectFile.read_enclosing

    def bad_sector(self: DirectFile, address: int, offset: int, nbytes: int) -> None:
        if any(start <= offset < end for start, end in ranges):
            raise ReadError(f"{path}: bad sector")
        read(self, address, offset, nbytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DirectFile, "read_enclosing", bad_sector)
        yield


def sector(checked: Checked, layer: int, expert: int, weight: int) -> tuple[int, int]:
    where = checked.catalog.layers[layer].weights[weight]
    return where.offset + expert * where.nbytes, where.offset + (expert + 1) * where.nbytes


def test_hits_misses_and_bytes_are_counted(tiny: Tiny) -> None:
    with checked(tiny("gpt-oss"), 12) as c:
        per_expert = c.catalog.layers[0].expert_bytes
        c.ensure(0, [3, 1, 3, 2])  # 3 distinct
        c.cache.phase = "decode"
        c.ensure(0, [1, 2, 5])
        prefill, decode = c.cache.stats["prefill"], c.cache.stats["decode"]
        assert (prefill.hits, prefill.misses, prefill.bytes) == (0, 3, 3 * per_expert)
        assert (decode.hits, decode.misses, decode.bytes) == (2, 1, per_expert)
        assert decode.hit_rate == pytest.approx(2 / 3)


def test_hit_reads_nothing(tiny: Tiny) -> None:
    with checked(tiny("gpt-oss"), 12) as c:
        first = c.ensure(0, [0, 1, 2])
        with failing(Path("any"), [(0, 1 << 60)]):
            assert c.ensure(0, [2, 0, 1]) == [first[2], first[0], first[1]]


def test_reads_that_are_left_under_way(tiny: Tiny) -> None:
    with checked(tiny("gpt-oss"), 12) as c:
        c.ensure(0, [1, 2])
        wanted = [1, 3, 2, 5]
        slots = c.cache.ensure(0, np.array(wanted, np.int32), leave_all=True).tolist()
        assert c.cache.late == {3, 5}
        c.cache.finish(leave_last=True)
        assert not c.cache.late
        assert c.cache.pending
        c.cache.finish()
        assert not c.cache.pending
        c.check(0, wanted, slots)


def test_slots_are_numbered_within_their_group(tiny: Tiny) -> None:
    with checked(tiny("olmoe"), [4, 6, 8, 10]) as c:
        for layer, n in enumerate([4, 6, 8, 10]):
            for first in range(0, 16, 4):
                assert all(0 <= slot < n for slot in c.ensure(layer, list(range(first, first + 4))))


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize(("name", "slots"), [("gpt-oss", 4), ("gpt-oss", 13), ("llama", 2), ("gemma4", 5)])
def test_random_requests(name: str, slots: int, policy: str, tiny: Tiny) -> None:
    rng = np.random.default_rng(3)
    with checked(tiny(name), slots, policy) as c:
        n, layers = c.catalog.n_experts, len(c.catalog.layers)
        for _ in range(60):
            for layer in range(layers):
                size = int(rng.integers(1, min(slots, n) + 1))
                experts = rng.choice(n, size, replace=False).tolist()
                c.ensure(layer, experts + experts[: size // 2])
        assert c.cache.stats["prefill"].hits > 0


requests = st.lists(
    st.tuples(
        st.integers(0, 3),  # layer
        st.lists(st.integers(0, 11), min_size=1, max_size=8),  # experts, repeats allowed
        st.none() | st.tuples(st.integers(0, 11), st.integers(0, 2)),  # expert and weight that cannot be read
    ),
    max_size=25,
)


@settings(max_examples=60)
@given(requests=requests, policy=st.sampled_from(["lru", "lfu"]), slots=st.integers(4, 20))
def test_any_sequence_with_failures(
    requests: list[tuple[int, list[int], tuple[int, int] | None]], policy: str, slots: int, tiny: Tiny
) -> None:
    with checked(tiny("gpt-oss"), slots, policy) as c:
        residency = c.policy.residency
        for layer, experts, broken in requests:
            bad = [] if broken is None else [sector(c, layer, *broken)]
            absent = {e for e in experts if residency.slot_of[layer, e] < 0}
            with failing(Path("m"), bad):
                try:
                    c.ensure(layer, experts)
                except ReadError:
                    assert broken is not None
                    assert broken[0] in absent
                    assert not absent & set(residency.resident(layer).tolist())
                    check_residency(residency)
                except BudgetError:
                    group = c.catalog.groups[layer]
                    assert len(set(experts)) > residency.group_start[group + 1] - residency.group_start[group]
                else:
                    assert broken is None or broken[0] not in absent
            if len(set(experts)) <= 4:
                c.ensure(layer, experts)  # it works as soon as the drive does


def test_failed_reads_leave_absent_experts_and_free_slots(tiny: Tiny) -> None:
    with checked(tiny("gpt-oss"), 4) as c:
        kept = c.ensure(0, [0, 1])
        with failing(Path("m"), [sector(c, 0, 7, 1)]), pytest.raises(ReadError, match="bad sector"):
            c.ensure(0, [0, 7, 8])
        residency = c.policy.residency
        assert 7 not in residency.resident(0)
        assert 8 not in residency.resident(0)  # read with it: nobody vouches for it
        assert c.ensure(0, [0]) == kept[:1]
        c.ensure(0, [7, 8, 0, 9])


def test_interrupted_wait_waits_for_the_reads(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C no thread may still write into a slot that is given to somebody else."""
    with checked(tiny("gpt-oss"), 4) as c:
        go, begun, read = threading.Event(), threading.Event(), DirectFile.read_enclosing
        finished: list[int] = []
        wait, interrupted = ExpertReader.wait, []

        def slow(self: DirectFile, address: int, offset: int, nbytes: int) -> None:
            begun.set()
            go.wait(20)
            read(self, address, offset, nbytes)
            finished.append(offset)

        def interrupt(self: ExpertReader, ticket: Ticket) -> None:
            if interrupted:
                return wait(self, ticket)
            interrupted.append(True)
            assert begun.wait(20)
            go.set()
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(DirectFile, "read_enclosing", slow)
            patch.setattr(ExpertReader, "wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                c.ensure(0, [1, 2, 3])
        assert len(finished) == 9
        assert not len(c.policy.residency.resident(0))
        c.ensure(0, [3, 4, 5])


def test_more_experts_than_slots(tiny: Tiny) -> None:
    with checked(tiny("llama"), 3) as c:
        with pytest.raises(BudgetError, match="5 experts of one layer do not fit .* smaller micro-batch"):
            c.ensure(0, [0, 1, 2, 3, 4, 0])
        c.ensure(0, [5, 6, 7])


def test_long_requests(tiny: Tiny) -> None:
    """A micro-batch asks for tokens x top-k ids at once."""
    with checked(tiny("gpt-oss"), 36) as c:
        c.ensure(0, np.random.default_rng(0).integers(0, 12, 3000).tolist())


def test_threads_take_turns(tiny: Tiny) -> None:
    with checked(tiny("llama"), 8) as c, ThreadPoolExecutor(4) as threads:
        jobs = [
            threads.submit(c.cache.ensure, layer, np.array([e, (e + 3) % 8], np.int32))
            for e in range(8)
            for layer in range(3)
        ]
        for job in jobs:
            job.result()
        check_residency(c.policy.residency)
        for layer in range(3):
            c.ensure(layer, list(range(8)))
            stats = c.cache.stats["prefill"]
        assert stats.misses == 24  # everything fits: each expert was read once
