"""Notes about drives, and small files written as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashmoe.common.files import cache_folder, write_atomically
from flashmoe.errors import ReadError
from flashmoe.storage import disk
from flashmoe.storage.addresses import reserve
from flashmoe.storage.disk import read_ceiling
from flashmoe.storage.reader import ExpertReader, Read
from flashmoe.tools import doctor


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "flashmoe"


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ExpertReader]:
    """A reader of a file that counts as large."""
    monkeypatch.setattr(disk, "_LEAST_FILE", 1 << 20)
    monkeypatch.setattr(disk, "_SAMPLE_BYTES", 1 << 20)
    (tmp_path / "large").write_bytes(bytes(12 << 20))
    opened = ExpertReader([tmp_path / "large"])
    if not opened.direct:
        opened.close()
        pytest.skip("the temporary folder's file system has no direct reads")
    yield opened
    opened.close()


def test_ceiling_is_measured_once(home: Path, reader: ExpertReader, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_ceiling(reader, 10_000)
    assert first > 0
    (note,) = json.loads((home / "drives.json").read_text()).values()
    assert note["gb_per_s"] == first
    assert (note["depth"], note["chunk"]) in disk._TRIED

    def again(*_: object) -> float:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "_measure", again)
        assert read_ceiling(reader, 10_000) == first
    read_ceiling(reader, 100_000)  # another size of read is another question
    assert len(json.loads((home / "drives.json").read_text())) == 2


def test_a_reader_at_work_is_left_alone(
    home: Path, reader: ExpertReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its depth and the reads that are under way, and the measurement's memory is freed."""
    reader.tune(3, 4096)
    memory, address = reserve(1 << 20)
    reader.keep(memory)
    ticket = reader.prefetch([Read(0, 0, 1 << 20, address)])
    held: list[int] = []
    reserve_huge = disk.reserve_huge
    monkeypatch.setattr(disk, "reserve_huge", lambda n: (held.append(n), reserve_huge(n))[1])
    assert read_ceiling(reader, 9 << 20) > 0
    assert (reader._depth, reader._chunk) == (3, 4096)
    assert ticket.pending == 256
    reader.wait(ticket)
    assert ticket.bytes == 1 << 20
    assert len(reader._memory) == 1
    assert held == [disk._MOST_HELD]


@pytest.mark.parametrize(
    "notes",
    [
        *("", "{", "[1, 2]", "null", '{"a": "fast"}', '{"a": null}', '{"a": 1.5}', "\x00\xff"),
        '{"a": {"gb_per_s": 1, "depth": 0, "chunk": 0}}',
        '{"a": {"gb_per_s": 1, "depth": 1e999, "chunk": -7}}',
    ],
)
def test_damaged_notes_are_replaced(notes: str, home: Path, reader: ExpertReader) -> None:
    home.mkdir(parents=True)
    (home / "drives.json").write_text(notes, encoding="latin-1")
    measured = read_ceiling(reader, 4096)
    (drive,) = disk._read_notes().values()
    assert drive.gb_per_s == measured


def test_another_way_must_be_clearly_better(
    home: Path, reader: ExpertReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that the reader's ways move: what is chosen is what a reader does after the next start."""
    now, way = 0.0, disk._TRIED[0]
    seconds = dict.fromkeys(disk._TRIED, 1.0)

    def tuned(self: ExpertReader, depth: int, chunk: int) -> None:
        nonlocal way
        way = depth, chunk

    def wait(self: ExpertReader, ticket: object) -> None:
        nonlocal now
        now += seconds[way]

    monkeypatch.setattr(ExpertReader, "tune", tuned)
    monkeypatch.setattr(ExpertReader, "wait", wait)
    monkeypatch.setattr(disk, "_MOST_SECONDS", 1e9)
    monkeypatch.setattr(disk.time, "perf_counter", lambda: now)
    for faster, chosen in ((0.95, disk._TRIED[0]), (0.5, disk._TRIED[3])):
        seconds[disk._TRIED[3]] = faster
        read_ceiling(reader, 100_000, fresh=True)
        way = (0, 0)
        disk.tune(reader, 100_000)
        assert way == chosen
    rounds = iter([2.0, 0.5, 2.0])

    def disturbed(self: ExpertReader, ticket: object) -> None:
        """The usual way is slow but for once: somebody else used the drive."""
        nonlocal now
        now += next(rounds) if way == disk._TRIED[0] else 0.8

    monkeypatch.setattr(ExpertReader, "wait", disturbed)
    read_ceiling(reader, 200_000, fresh=True)
    way = (0, 0)
    disk.tune(reader, 200_000)
    assert way == disk._TRIED[0]
    way = disk._TRIED[3]
    disk.tune(reader, 4096)  # not measured
    assert way == disk._TRIED[3]


def test_small_files_tell_nothing(home: Path, tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(bytes(1 << 20))
    reader = ExpertReader([tmp_path / "small"])
    assert read_ceiling(reader, 4096) == 0.0
    assert not home.exists()
    reader.close()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "flashmoe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert cache_folder() == tmp_path / "me" / ".cache" / "flashmoe"


def test_write_atomically_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_write_atomically_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"data")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_write_atomically_leaves_the_old_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomically_into_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file|directory"):
        write_atomically(tmp_path / "file" / "below", b"data")


def test_the_largest_file_is_measured(home: Path, tmp_path: Path, reader: ExpertReader) -> None:
    """The first file of a split model may hold its header only."""
    (tmp_path / "first").write_bytes(bytes(100))
    split = ExpertReader([tmp_path / "first", tmp_path / "large"])
    assert read_ceiling(split, 10_000) > 0
    split.close()


def test_samples_write_nothing_where_there_is_something_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model, the largest part of a split one, or any large file of a folder."""
    monkeypatch.setattr(disk, "_LEAST_FILE", 1 << 20)
    monkeypatch.setattr(disk.tempfile, "NamedTemporaryFile", None)
    sizes = {
        "m-00001-of-00002.gguf": 100,
        "m-00002-of-00002.gguf": 1 << 20,
        "other.gguf": 2 << 20,
        "s.gguf": 9000,
    }
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    for place, expected in (
        ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"),
        ("other.gguf", "other.gguf"),
        ("s.gguf", "s.gguf"),  # small, and larger than what is read
        ("", "other.gguf"),
    ):
        with disk.sample(tmp_path / place, 4096) as found:
            assert found == tmp_path / expected


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(disk.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(ReadError, match="cannot be written there .Read-only"), disk.sample(tmp_path, 4096):
        pass
    check = doctor.drive(tmp_path)
    assert check.status == "advice"
    assert "name a model on it" in check.change
