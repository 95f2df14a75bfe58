"""The reader's threads: order, cancelling, promoting, errors and the end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest

from flashmoe.errors import ReadError
from flashmoe.storage.direct import DirectFile
from flashmoe.storage.reader import ExpertReader, Read

CONTENT = np.random.default_rng(1).integers(0, 256, 1 << 18, np.uint8).tobytes()


class Slow:
    """Stands between the reader and its file: reads wait for `go`, and are noted in the order in which they begin."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.begun: list[int] = []
        self.first = threading.Event()
        read = DirectFile.read_enclosing

        def slow(file: DirectFile, address: int, offset: int, nbytes: int) -> None:
            self.begun.append(offset)
            self.first.set()
            self.go.wait(20)
            read(file, address, offset, nbytes)

        patch.setattr(DirectFile, "read_enclosing", slow)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "f").write_bytes(CONTENT)
    return tmp_path / "f"


@pytest.fixture
def single(path: Path) -> Iterator[ExpertReader]:
    """A reader with one thread: its order can be told."""
    reader = ExpertReader([path], threads=1)
    yield reader
    reader.close()


@pytest.fixture
def memory() -> np.ndarray:
    return np.frombuffer(mmap(-1, 1 << 20), np.uint8)


def reads(memory: np.ndarray, offsets: list[int], nbytes: int = 4096) -> list[Read]:
    return [Read(0, offset, nbytes, memory.ctypes.data + 2 * offset + offset % 4096) for offset in offsets]


def content(memory: np.ndarray, read: Read) -> bytes:
    start = read.address - memory.ctypes.data
    return memory[start : start + read.nbytes].tobytes()


def test_bytes_arrive(path: Path, memory: np.ndarray) -> None:
    reader = ExpertReader([path, path])
    batch = [r._replace(file=i % 2) for i, r in enumerate(reads(memory, [4096 * i for i in range(50)]))]
    ticket = reader.demand(batch)
    ticket.wait()
    assert ticket.done.is_set()
    for read in batch:
        assert content(memory, read) == CONTENT[read.offset : read.offset + read.nbytes]
    reader.close()


def test_no_reads_are_done_at_once(single: ExpertReader) -> None:
    single.demand([]).wait()
    single.prefetch([]).wait()


def test_demand_goes_before_prefetch(
    single: ExpertReader, memory: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    first = single.prefetch(reads(memory, [0]))
    assert slow.first.wait(20)
    later = single.prefetch(reads(memory, [8192, 12288]))
    urgent = single.demand(reads(memory, [16384, 20480]))
    slow.go.set()
    for ticket in (first, later, urgent):
        ticket.wait()
    assert slow.begun == [0, 16384, 20480, 8192, 12288]


def test_promoted_prefetch_overtakes_others(
    single: ExpertReader, memory: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    first = single.prefetch(reads(memory, [0]))
    assert slow.first.wait(20)
    waiting, wanted = (
        single.prefetch(reads(memory, [4096, 8192])),
        single.prefetch(reads(memory, [12288, 16384])),
    )
    single.promote(wanted)
    single.promote(first)  # under way already: nothing to move
    slow.go.set()
    for ticket in (first, waiting, wanted):
        ticket.wait()
    assert slow.begun == [0, 12288, 16384, 4096, 8192]
    assert content(memory, wanted.reads[1]) == CONTENT[16384:20480]


def test_cancelled_prefetch_is_not_read_but_ends(
    single: ExpertReader, memory: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    begun = single.prefetch(reads(memory, [0, 4096]))
    assert slow.first.wait(20)
    queued = single.prefetch(reads(memory, [8192]))
    single.cancel(begun)
    single.cancel(queued)
    slow.go.set()
    assert begun.done.wait(20)
    assert queued.done.wait(20)
    assert slow.begun == [0]
    single.demand(reads(memory, [8192])).wait()
    assert slow.begun == [0, 8192]


def test_error_reaches_the_waiter_and_nobody_else(single: ExpertReader, memory: np.ndarray) -> None:
    beyond = [Read(0, len(CONTENT) + 8192, 4096, memory.ctypes.data)]
    ticket = single.demand([*reads(memory, [0]), *beyond, *reads(memory, [4096])])
    with pytest.raises(ReadError, match="ends at byte"):
        ticket.wait()
    for read in (ticket.reads[0], ticket.reads[2]):  # the others are done all the same
        assert content(memory, read) == CONTENT[read.offset : read.offset + read.nbytes]
    with pytest.raises(ReadError):
        ticket.wait()  # still
    single.demand(reads(memory, [8192])).wait()


def test_unexpected_errors_do_not_end_a_thread(
    single: ExpertReader, memory: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(DirectFile, "read_enclosing", broken)
        with pytest.raises(RuntimeError, match="a bug"):
            single.demand(reads(memory, [0])).wait()
    single.demand(reads(memory, [0])).wait()


def test_close_drops_what_is_queued(path: Path, memory: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    reader = ExpertReader([path], threads=1)
    reader.demand(reads(memory, [0]))
    assert slow.first.wait(20)
    reader.prefetch(reads(memory, [4096]))
    closing = threading.Thread(target=reader.close)
    closing.start()
    while reader._prefetch:  # close has emptied the queues
        closing.join(0.001)
    slow.go.set()
    closing.join(20)
    assert not closing.is_alive()
    assert slow.begun == [0]
    assert not any(thread.is_alive() for thread in reader._threads)


def test_close_ends_the_threads(path: Path) -> None:
    before = threading.active_count()
    reader = ExpertReader([path], threads=3)
    assert threading.active_count() == before + 3
    reader.close()
    assert threading.active_count() == before


def test_missing_file(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(ReadError):
        ExpertReader([tmp_path / "none"])
    assert threading.active_count() == before
