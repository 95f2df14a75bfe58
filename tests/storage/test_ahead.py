"""Chunks that are read ahead: the file's bytes, whatever is copied in which order."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.errors import ReadError
from flashmoe.storage import ahead
from flashmoe.storage.ahead import ReadAhead
from flashmoe.storage.direct import DirectFile

CONTENT = np.random.default_rng(0).integers(0, 256, 200_000, np.uint8).tobytes()
CHUNK = 8192


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DirectFile]:
    path = tmp_path_factory.mktemp("ahead") / "f"
    path.write_bytes(CONTENT)
    file = DirectFile(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "_CHUNK", CHUNK)
        yield file
    file.close()


def copied(reads: ReadAhead, file: DirectFile, segment: tuple[int, int], offset: int, nbytes: int) -> bytes:
    memory = ctypes.create_string_buffer(nbytes)
    reads.copy(file, ctypes.addressof(memory), segment, offset, nbytes)
    return memory.raw


@given(
    st.lists(
        st.tuples(
            st.integers(0, 99_000), st.integers(1, 99_000), st.integers(0, 98_000), st.integers(1, 40_000)
        ),
        min_size=1,
        max_size=12,
    )
)
def test_what_is_copied_is_the_file_s(file: DirectFile, copies: list[tuple[int, int, int, int]]) -> None:
    reads = ReadAhead()
    for begin, size, offset, nbytes in copies:
        offset = min(offset, size - 1)
        nbytes = min(nbytes, size - offset)
        expected = CONTENT[begin + offset : begin + offset + nbytes]
        assert copied(reads, file, (begin, size), offset, nbytes) == expected
    reads.close()


def test_later_chunks_are_read_with_the_first(file: DirectFile, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    read = DirectFile.read_enclosing

    def noted(self: DirectFile, address: int, offset: int, nbytes: int) -> None:
        begun.append(offset)
        read(self, address, offset, nbytes)

    monkeypatch.setattr(DirectFile, "read_enclosing", noted)
    reads = ReadAhead()
    copied(reads, file, (100, 100_000), 0, 10)
    copied(reads, file, (100, 100_000), 10, 10)
    reads.close()
    assert sorted(begun) == [100 + CHUNK * i for i in range(5)]


def test_a_read_that_fails(file: DirectFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ReadError("gone")

    reads = ReadAhead()
    with monkeypatch.context() as patch:
        patch.setattr(DirectFile, "read_enclosing", fail)
        with pytest.raises(ReadError, match="gone"):
            copied(reads, file, (0, 50_000), 0, 50_000)
    reads.close()


def test_files_beyond_their_end(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x" * 100)
    file, reads = DirectFile(tmp_path / "short"), ReadAhead()
    with pytest.raises(ReadError):
        copied(reads, file, (0, 5000), 0, 5000)
    reads.close()
    file.close()
