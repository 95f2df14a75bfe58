"""The reader: bytes arrive, demand goes first, prefetches can be dropped, errors reach who waits; on both queues."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashmoe.errors import ReadError
from flashmoe.storage import reader as reader_module
from flashmoe.storage.aio import Done, KernelQueue, ThreadQueue, open_queue
from flashmoe.storage.direct import DirectFile
from flashmoe.storage.reader import ExpertReader, Read, Ticket

CONTENT = np.random.default_rng(1).integers(0, 256, 1 << 18, np.uint8).tobytes()


class Held:
    """A queue whose reads end when they are let go; notes what was started, in order."""

    depth = 2

    def __init__(self, files: list[DirectFile]) -> None:
        self.started: list[int] = []
        self.under_way: list[tuple[int, Read]] = []

    def start(self, reads: list[tuple[int, Read]]) -> None:
        self.started += [read.offset for _, read in reads]
        self.under_way += reads
        assert len(self.under_way) <= self.depth

    def collect(self, timeout: float, least: int = 1) -> list[Done]:
        ended = self.under_way[:1] if timeout else []
        self.under_way = self.under_way[len(ended) :]
        return [(number, None) for number, _ in ended]

    def close(self) -> None:
        self.under_way.clear()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "f").write_bytes(CONTENT)
    return tmp_path / "f"


@pytest.fixture(params=[KernelQueue, ThreadQueue])
def reader(
    path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ExpertReader]:
    if request.param is KernelQueue and not isinstance(open_queue([DirectFile(path)]), KernelQueue):
        pytest.skip("no direct reads, or no asynchronous I/O, on this system")
    monkeypatch.setattr(reader_module, "open_queue", request.param)
    opened = ExpertReader([path, path])
    yield opened
    opened.close()


@pytest.fixture
def held(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ExpertReader, Held]:
    monkeypatch.setattr(reader_module, "open_queue", Held)
    made = ExpertReader([path])
    assert isinstance(made._queue, Held)
    return made, made._queue


@pytest.fixture
def memory() -> np.ndarray:
    return np.frombuffer(mmap(-1, 1 << 20), np.uint8)


def reads(memory: np.ndarray, offsets: list[int], nbytes: int = 4096) -> list[Read]:
    return [Read(0, offset, nbytes, memory.ctypes.data + 2 * offset + offset % 4096) for offset in offsets]


def content(memory: np.ndarray, read: Read) -> bytes:
    start = read.address - memory.ctypes.data
    return memory[start : start + read.nbytes].tobytes()


def check(memory: np.ndarray, batch: list[Read]) -> None:
    for read in batch:
        assert content(memory, read) == CONTENT[read.offset : read.offset + read.nbytes]


def test_bytes_arrive(reader: ExpertReader, memory: np.ndarray) -> None:
    batch = [r._replace(file=i % 2) for i, r in enumerate(reads(memory, [4096 * i for i in range(50)]))]
    ticket = reader.demand(batch)
    reader.wait(ticket)
    assert ticket.done
    assert ticket.bytes == 50 * 4096
    check(memory, batch)


def test_more_reads_than_the_queue_is_deep(reader: ExpertReader, memory: np.ndarray) -> None:
    offsets = [512 * i for i in range(500)]
    batch = [Read(0, offset, 512, memory.ctypes.data + 1024 * i) for i, offset in enumerate(offsets)]
    reader.wait(reader.demand(batch))
    check(memory, batch)


@pytest.mark.parametrize("shift", [0, 96, 511])
def test_misaligned_reads(reader: ExpertReader, memory: np.ndarray, shift: int) -> None:
    """In place where the address is as misaligned as the offset, through a bounce buffer elsewhere."""
    batch = [Read(0, 8192 + shift, 5000, memory.ctypes.data + 4096 + address) for address in (shift, 32)]
    for read in batch:
        reader.wait(reader.demand([read]))
        check(memory, [read])


def test_no_reads_are_done_at_once(reader: ExpertReader) -> None:
    reader.wait(reader.demand([]))
    reader.wait(reader.prefetch([]))


def test_prefetch_is_seen_to_end_without_waiting(reader: ExpertReader, memory: np.ndarray) -> None:
    ticket = reader.prefetch(batch := reads(memory, [0, 8192]))
    assert ticket.started
    while not ticket.done:
        reader.poll()
    check(memory, batch)


def test_errors_reach_the_waiter_and_nobody_else(reader: ExpertReader, memory: np.ndarray) -> None:
    beyond = [Read(0, len(CONTENT) + 8192, 4096, memory.ctypes.data)]
    good = reads(memory, [0, 4096])
    ticket = reader.demand([good[0], *beyond, good[1]])
    with pytest.raises(ReadError, match="ends at byte"):
        reader.wait(ticket)
    check(memory, good)  # the others are done all the same
    with pytest.raises(ReadError):
        reader.wait(ticket)  # still
    reader.wait(reader.demand(reads(memory, [8192])))


def test_unexpected_errors_reach_the_waiter(
    path: Path, memory: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(reader_module, "open_queue", ThreadQueue)
    reader = ExpertReader([path])
    with monkeypatch.context() as patch:
        patch.setattr(DirectFile, "read_enclosing", broken)
        with pytest.raises(RuntimeError, match="a bug"):
            reader.wait(reader.demand(reads(memory, [0])))
    reader.wait(reader.demand(reads(memory, [0])))
    reader.close()


def test_several_threads_wait(reader: ExpertReader, memory: np.ndarray) -> None:
    batches = [reads(memory, [4096 * (8 * i + j) for j in range(8)]) for i in range(6)]
    threads = [
        threading.Thread(target=lambda b=b: reader.wait(reader.demand(b)))  # type: ignore[misc]
        for b in batches
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    check(memory, [read for batch in batches for read in batch])


def test_demand_goes_before_prefetch(held: tuple[ExpertReader, Held], memory: np.ndarray) -> None:
    reader, queue = held
    first = reader.prefetch(reads(memory, [0]))
    urgent = reader.demand(reads(memory, [4096, 8192]))
    later = reader.prefetch(reads(memory, [12288, 16384]))
    assert queue.started == [0, 4096]
    reader.wait(urgent)
    for ticket in (first, later):
        reader.wait(ticket)
    assert queue.started == [0, 4096, 8192, 12288, 16384]


def test_no_prefetch_starts_beside_a_demand_read(held: tuple[ExpertReader, Held], memory: np.ndarray) -> None:
    reader, queue = held
    urgent = reader.demand(reads(memory, [0]))
    prefetch = reader.prefetch(reads(memory, [4096]))
    assert queue.started == [0]  # though there is room
    reader.wait(urgent)
    assert queue.started == [0, 4096]
    assert prefetch.started
    assert not prefetch.done


def test_promoted_prefetch_is_a_demand_read(held: tuple[ExpertReader, Held], memory: np.ndarray) -> None:
    reader, queue = held
    urgent = reader.demand(reads(memory, [0]))
    waiting, wanted = reader.prefetch(reads(memory, [4096])), reader.prefetch(reads(memory, [8192]))
    reader.promote(wanted)
    assert queue.started == [0, 8192]
    reader.promote(wanted)  # nothing left to move
    for ticket in (urgent, wanted, waiting):
        reader.wait(ticket)
    assert queue.started == [0, 8192, 4096]


def test_promoted_prefetch_under_way_is_a_demand_read(
    held: tuple[ExpertReader, Held], memory: np.ndarray
) -> None:
    reader, queue = held
    wanted = reader.prefetch(reads(memory, [0]))
    reader.promote(wanted)
    reader.prefetch(reads(memory, [4096]))
    assert queue.started == [0]  # though there is room
    reader.wait(wanted)
    assert queue.started == [0, 4096]


def test_cancelled_prefetch_is_not_read_but_ends(held: tuple[ExpertReader, Held], memory: np.ndarray) -> None:
    reader, queue = held
    begun = reader.prefetch(reads(memory, [0, 4096, 8192]))
    queued = reader.prefetch(reads(memory, [12288]))
    reader.cancel(begun)
    reader.cancel(queued)
    assert queued.done
    assert not begun.done  # two of its reads are under way
    reader.wait(begun)
    assert begun.bytes == 8192
    assert queue.started == [0, 4096]


def test_close_drops_what_is_queued(held: tuple[ExpertReader, Held], memory: np.ndarray) -> None:
    reader, queue = held
    reader.demand(reads(memory, [0, 4096, 8192]))
    reader.close()
    assert queue.started == [0, 4096]


def test_close_waits_for_what_is_under_way(path: Path, memory: np.ndarray) -> None:
    before = threading.active_count()
    for queue in (ThreadQueue, open_queue):
        reader = ExpertReader([path])
        reader._queue = queue([*reader.files])
        tickets: list[Ticket] = [reader.demand(reads(memory, [4096 * i])) for i in range(4)]
        reader.close()
        assert len(tickets) == 4
    assert threading.active_count() == before


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ReadError):
        ExpertReader([tmp_path / "none"])


def test_kernel_queue_falls_back_where_a_read_is_refused(
    path: Path, memory: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that the system refuses, or that ends short, is repeated by the plain way."""
    files = [DirectFile(path)]
    if not isinstance(queue := open_queue(files), KernelQueue):
        pytest.skip("no direct reads, or no asynchronous I/O, on this system")
    plain, read_plainly = [], KernelQueue._read_plainly

    def note(self: KernelQueue, number: int, read: Read) -> None:
        plain.append(number)
        read_plainly(self, number, read)

    monkeypatch.setattr(KernelQueue, "_read_plainly", note)
    last = len(CONTENT) - 4096
    batch = [Read(0, last, 8192, memory.ctypes.data), *reads(memory, [8192])]
    queue.start(list(enumerate(batch)))
    ended: dict[int, Exception | None] = {}
    while len(ended) < 2:
        ended.update(queue.collect(10))
    assert plain == [0]  # short: the file ends
    assert isinstance(ended[0], ReadError)
    assert ended[1] is None
    check(memory, batch[1:])
    queue.close()


def invert(source: int, slot: int) -> None:
    """Another layout of 4096 bytes: every bit the other way."""
    data = np.frombuffer((ctypes.c_uint8 * 4096).from_address(source), np.uint8)
    np.frombuffer((ctypes.c_uint8 * 4096).from_address(slot), np.uint8)[:] = ~data


def inverted(memory: np.ndarray, batch: list[Read]) -> bool:
    return all(
        (~np.frombuffer(CONTENT, np.uint8, 4096, r.offset)).tobytes() == content(memory, r) for r in batch
    )


@given(
    offsets=st.lists(st.integers(0, len(CONTENT) - 4096), max_size=60),
    cancelled=st.sets(st.integers(0, 59)),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_placed_reads(reader: ExpertReader, offsets: list[int], cancelled: set[int]) -> None:
    """More of them than buffers, demanded and prefetched, some cancelled, beside reads that are not placed."""
    memory = np.zeros(len(offsets) * 8192 + 8192, np.uint8)
    if not reader._bounce:
        assert 0 < reader.reserve_bounce_buffers(4096) < 1 << 20
    free = len(reader._bounce)
    batch = [Read(0, offset, 4096, memory.ctypes.data + 8192 * i, invert) for i, offset in enumerate(offsets)]
    tickets = [(reader.demand if i % 3 else reader.prefetch)([read]) for i, read in enumerate(batch)]
    cancelled &= set(range(0, len(batch), 3))
    for i in cancelled:
        reader.cancel(tickets[i])
    for ticket in tickets:
        reader.promote(ticket)
        reader.wait(ticket)
    assert inverted(memory, [read for i, read in enumerate(batch) if i not in cancelled])
    assert len(reader._bounce) == free


def test_placed_reads_that_fail_are_not_placed(reader: ExpertReader, memory: np.ndarray) -> None:
    reader.reserve_bounce_buffers(4096)
    placed: list[int] = []
    for _ in range(40):  # more than there are buffers: each comes back
        bad = Read(0, len(CONTENT) + 8192, 4096, memory.ctypes.data, lambda *at: placed.append(1))
        with pytest.raises(ReadError, match="ends at byte"):
            reader.wait(reader.demand([bad]))
    assert not placed
    good = Read(0, 4096, 4096, memory.ctypes.data, invert)
    reader.wait(reader.demand([good]))
    assert inverted(memory, [good])


def test_prefetches_leave_buffers_to_demand_reads(
    held: tuple[ExpertReader, Held], memory: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, queue = held
    monkeypatch.setattr(queue, "depth", 1000)
    reader.tune(1000, 0)
    reader.reserve_bounce_buffers(4096)
    ahead = [Read(0, 4096 * i, 4096, memory.ctypes.data + 8192 * i, invert) for i in range(64)]
    reader.prefetch(ahead)
    started = len(queue.started)
    assert 0 < started < len(ahead)
    reader.demand([ahead[40]])
    assert len(queue.started) == started + 1


@pytest.mark.parametrize("chunk", [4096, 8192, 65536])
@pytest.mark.parametrize("depth", [1, 3, 1000])
def test_tuned(chunk: int, depth: int, reader: ExpertReader, memory: np.ndarray) -> None:
    """However long the reads and wherever they begin, cut or not."""
    reader.tune(depth, chunk)
    for offset, nbytes in ((0, 4096), (4096, 12288), (1000, 30000), (5000, 100), (8192, 100_000)):
        read = Read(0, offset, nbytes, memory.ctypes.data + 4096 + offset % 4096)
        memory[:] = 0
        ticket = reader.demand([read])
        reader.wait(ticket)
        assert content(memory, read) == CONTENT[offset : offset + nbytes]
        assert ticket.bytes == nbytes


def test_tuned_depth_and_pieces(held: tuple[ExpertReader, Held]) -> None:
    reader, queue = held
    queue.depth = 8
    reader.tune(3, 4096)
    ticket = reader.prefetch([Read(0, 4196, 20_000, (1 << 20) + 100)])
    assert queue.started == [4196, 8192, 12288]
    assert [read.nbytes for _, read in queue.under_way] == [3996, 4096, 4096]
    assert [read.address - (1 << 20) for _, read in queue.under_way] == [100, 4096, 8192]
    reader.wait(ticket)
    assert queue.started[-1] == 20480
    assert ticket.bytes == 20_000


def test_each_file_is_looked_at_once_where_its_reads_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it has changed, however many reads there were of it; files that were not read are left alone."""
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_bytes(CONTENT)
    looked: list[Path] = []
    monkeypatch.setattr(DirectFile, "check_unchanged", lambda file: looked.append(file.path))
    reader = ExpertReader(paths)
    memory = mmap(-1, 64 * 4096)
    reader.keep(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    reads = [Read(i % 2 * 2, 4096 * i, 4096, start + 4096 * i) for i in range(12)]
    reader.wait(reader.demand(reads))
    assert sorted(looked) == [paths[0], paths[2]]
    reader.close()
