"""Direct reads: every offset, length and address, with and without O_DIRECT, and files that end too early."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest

from flashmoe.errors import FlashMoEWarning, ReadError
from flashmoe.storage import direct
from flashmoe.storage.direct import DirectFile

SIZE = 3 * 4096 + 777
CONTENT = np.random.default_rng(5).integers(0, 256, SIZE, np.uint8).tobytes()
RAM_DISK = Path("/dev/shm")


class Memory:
    """Page-aligned memory filled with a pattern."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap(-1, nbytes)
        self._map.write(b"\xaa" * nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def __getitem__(self, part: slice) -> bytes:
        return self._map[part]


@pytest.fixture
def direct_file(tmp_path: Path) -> Iterator[DirectFile]:
    (tmp_path / "f").write_bytes(CONTENT)
    file = DirectFile(tmp_path / "f")
    yield file
    file.close()


@pytest.fixture(params=["direct", "ram disk", "refused"])
def file(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DirectFile]:
    """The same bytes behind O_DIRECT, on a RAM disk, and where the file system refuses O_DIRECT."""
    path = tmp_path / "f"
    if request.param == "ram disk":
        if not os.access(RAM_DISK, os.W_OK):
            pytest.skip("no RAM disk to write to")
        path = RAM_DISK / f"flashmoe-test-{os.getpid()}"
    path.write_bytes(CONTENT)
    if request.param == "refused":
        really_open = os.open

        def refuse(name: str, flags: int) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return really_open(name, flags)

        monkeypatch.setattr(os, "open", refuse)
    try:
        opened = DirectFile(path)
        if request.param == "refused":
            assert not opened.direct
        if not opened.direct:
            assert (opened.align, opened.align_memory) == (1, 1)
        yield opened
        opened.close()
    finally:
        path.unlink()


PLACES = [
    (0, 512),
    (0, SIZE),
    (1, 1),
    (511, 2),
    (4095, 4098),
    (4096, 4096),
    (32, 100),
    (SIZE - 1, 1),
    (SIZE - 777, 777),
    (12288, 777),
]


def test_alignment_is_known(direct_file: DirectFile) -> None:
    assert direct_file.size == SIZE
    if direct_file.direct:
        assert direct_file.align in (512, 1024, 2048, 4096)
        assert direct_file.align_memory in (4, 512, 1024, 2048, 4096)


def test_a_kernel_that_does_not_tell_has_the_drive_s_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partition has its disk's; what is on no drive of its own has a page."""
    path = tmp_path / "f"
    path.write_bytes(CONTENT)
    device = os.stat(path).st_dev
    disk, devices = tmp_path / "sys/vda", tmp_path / "sys/block"
    (disk / "vda1").mkdir(parents=True)
    (disk / "queue").mkdir()
    (disk / "queue/logical_block_size").write_text("512\n")
    devices.mkdir()
    monkeypatch.setattr(direct, "_BLOCK_DEVICES", devices)
    assert direct._logical_block(path) == 4096
    (devices / f"{os.major(device)}:{os.minor(device)}").symlink_to(disk / "vda1")
    assert direct._logical_block(path) == 512
    monkeypatch.setattr(direct.ctypes, "CDLL", lambda *_, **__: object())  # a C library without statx
    assert direct._direct_alignment(path) == (512, 512)


def test_alignment_where_the_kernel_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(CONTENT)
    monkeypatch.setattr(direct, "_direct_alignment", lambda _: (4096, 4096))
    file, memory = DirectFile(tmp_path / "f"), Memory(8192)
    file.read_exact(memory.address + 3, 5, 1000)
    assert memory[3:1003] == CONTENT[5:1005]
    file.close()
    monkeypatch.undo()
    assert direct._direct_alignment(tmp_path / "none") == (4096, 4096)


@pytest.mark.parametrize(("offset", "nbytes"), PLACES)
@pytest.mark.parametrize("shift", [0, 1, 8, 511])
def test_read_exact_touches_nothing_else(offset: int, nbytes: int, shift: int, file: DirectFile) -> None:
    memory, start = Memory(1 << 15), 4096 + shift
    file.read_exact(memory.address + start, offset, nbytes)
    assert memory[start : start + nbytes] == CONTENT[offset : offset + nbytes]
    assert set(memory[:start] + memory[start + nbytes : 1 << 15]) == {0xAA}


@pytest.mark.parametrize(("offset", "nbytes"), PLACES)
@pytest.mark.parametrize("shift", [0, 1, 8, 511])
def test_read_enclosing_stays_within_its_slack(
    offset: int, nbytes: int, shift: int, file: DirectFile
) -> None:
    """In place where address and offset are equally misaligned (shift 0), through the bounce buffer elsewhere."""
    memory, start = Memory(1 << 15), 8192 + offset % 4096 + shift
    file.read_enclosing(memory.address + start, offset, nbytes)
    assert memory[start : start + nbytes] == CONTENT[offset : offset + nbytes]
    slack = file.align - 1
    assert set(memory[: start - slack] + memory[start + nbytes + slack : 1 << 15]) == {0xAA}


@pytest.mark.parametrize(("offset", "nbytes"), [(SIZE - 10, 11), (SIZE, 1), (SIZE + 5000, 10), (0, SIZE + 1)])
def test_reading_past_the_end(offset: int, nbytes: int, file: DirectFile) -> None:
    memory = Memory(1 << 15)
    with pytest.raises(ReadError, match="truncated while in use"):
        file.read_exact(memory.address, offset, nbytes)
    with pytest.raises(ReadError, match="truncated while in use"):
        file.read_enclosing(memory.address + 8192 + offset % 4096, offset, nbytes)


def test_file_that_shrinks(direct_file: DirectFile) -> None:
    memory = Memory(1 << 15)
    os.truncate(direct_file.path, 5000)
    direct_file.read_exact(memory.address, 4096, 5000 - 4096)
    assert memory[0:904] == CONTENT[4096:5000]
    with pytest.raises(ReadError):
        direct_file.read_exact(memory.address, 4096, 1000)


def test_transient_errors_are_retried_and_others_are_not(
    direct_file: DirectFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, really_read = Memory(1 << 15), os.preadv
    calls: list[int] = []

    def failing(code: int, times: int) -> None:
        calls.clear()

        def preadv(fd: int, buffers: list, offset: int) -> int:
            calls.append(offset)
            if len(calls) <= times:
                raise OSError(code, os.strerror(code))
            return really_read(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)

    monkeypatch.setattr("time.sleep", lambda _: None)
    for code in (errno.EIO, errno.EAGAIN, errno.EINTR):
        failing(code, direct.RETRIES)
        direct_file.read_exact(memory.address, 100, 600)
        assert memory[0:600] == CONTENT[100:700]
        failing(code, direct.RETRIES + 1)
        with pytest.raises(ReadError, match=os.strerror(code)):
            direct_file.read_exact(memory.address, 100, 600)
        assert len(calls) == direct.RETRIES + 1
    failing(errno.EBADF, 1)
    with pytest.raises(ReadError, match="Bad file"):
        direct_file.read_exact(memory.address, 100, 600)
    assert len(calls) == 1


def test_short_reads_are_continued(direct_file: DirectFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """A direct read may stop early, even within a unit: it goes on from the last whole one."""
    memory, really_read = Memory(1 << 15), os.preadv

    def short(fd: int, buffers: list, offset: int) -> int:
        return min(really_read(fd, buffers, offset), 4096 + 300)

    monkeypatch.setattr(os, "preadv", short)
    direct_file.read_exact(memory.address, 10, SIZE - 10)
    assert memory[0 : SIZE - 10] == CONTENT[10:]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="cannot be opened"):
        DirectFile(tmp_path / "none")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_opens_and_refuses(
    code: int, direct_file: DirectFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is opened anew, once, by what it is and not by its name, and its units stay."""
    if not direct_file.direct:
        pytest.skip("the temporary folder's file system has no direct reads")
    memory, really_read, align = Memory(1 << 15), os.preadv, direct_file.align

    def refuse(fd: int, buffers: list, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return really_read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    direct_file.path.rename(direct_file.path.with_name("renamed"))

    def read(offset: int, nbytes: int) -> bytes:
        start = 8192 + offset % align
        direct_file.read_enclosing(memory.address + start, offset, nbytes)
        return memory[start : start + nbytes]

    with pytest.warns(FlashMoEWarning, match="refuses direct reads") as warned:
        found = [read(*place) for place in PLACES]
    assert found == [CONTENT[offset : offset + nbytes] for offset, nbytes in PLACES]
    assert len(warned) == 1
    assert (direct_file.direct, direct_file.align) == (False, align)


def test_many_threads_see_the_refusal(direct_file: DirectFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have begun before the first of them opens the file anew."""
    if not direct_file.direct:
        pytest.skip("the temporary folder's file system has no direct reads")
    together, really_read = threading.Barrier(4), os.preadv

    def refuse(fd: int, buffers: list, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            together.wait()
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_read(fd, buffers, offset)

    def read(_: int) -> bytes:
        memory = Memory(8192)
        direct_file.read_exact(memory.address, 100, 600)
        return memory[0:600]

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.warns(FlashMoEWarning), ThreadPoolExecutor(4) as threads:
        assert set(threads.map(read, range(4))) == {CONTENT[100:700]}


def test_reads_that_stop_within_a_unit(direct_file: DirectFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """A direct read of less than a unit, in the middle of the file: that is no end."""
    if not direct_file.direct:
        pytest.skip("the temporary folder's file system has no direct reads")
    memory, really_read = Memory(1 << 15), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: min(really_read(fd, buffers, at), 100))
    with pytest.warns(FlashMoEWarning, match="stop short"):
        direct_file.read_exact(memory.address, 10, SIZE - 10)
    assert memory[0 : SIZE - 10] == CONTENT[10:]


def test_a_file_that_only_others_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> int:
        raise OSError(errno.EACCES, "Permission denied")

    (tmp_path / "f").write_bytes(CONTENT)
    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(ReadError, match="cannot be opened"):
        DirectFile(tmp_path / "f")


def test_a_thread_has_one_small_buffer_for_all_files(tmp_path: Path) -> None:
    """What arrives beside its place comes in parts; the buffer goes with its thread."""
    content = np.random.default_rng(6).integers(0, 256, 3 * direct.BOUNCE_BYTES + 777, np.uint8).tobytes()
    files = []
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(content)
        files.append(DirectFile(tmp_path / name))
    sizes: list[int] = []

    def read() -> None:
        for file in files:
            memory = Memory(1 << 22)
            file.read_exact(memory.address + 3, 5, len(content) - 6)
            assert memory[3 : len(content) - 3] == content[5:-1]
            assert set(memory[:3] + memory[len(content) - 3 : 1 << 22]) == {0xAA}
            sizes.append(direct._bounce.size)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(read).result()
    assert sizes[0] == sizes[1] <= direct.BOUNCE_BYTES + 2 * 4096
    for file in files:
        file.close()
