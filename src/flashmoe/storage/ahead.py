"""Reads large tensors in chunks, a few of them ahead: a drive is at its rate only with several reads under way."""

from __future__ import annotations

import ctypes
import mmap
from concurrent.futures import Future, ThreadPoolExecutor

from flashmoe.storage.addresses import reserve
from flashmoe.storage.direct import DirectFile

_CHUNK = 1 << 20  # bytes
_AHEAD = 4  # chunks under way beside the one that is waited for
_SLACK = 2 * mmap.PAGESIZE  # alignment adds as much around a chunk

_Chunk = tuple[DirectFile, tuple[int, int], int]


class ReadAhead:
    """Copies parts of segments of files, mostly one after the other. `close` it afterwards. Not thread-safe."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_AHEAD, "flashmoe-load")
        self._free = [reserve(_CHUNK + _SLACK) for _ in range(_AHEAD + 2)]
        #: (file, its segment, number of the chunk) -> the address of its first byte in the buffer
        self._chunks: dict[_Chunk, Future[int]] = {}
        self._buffers: dict[_Chunk, tuple[mmap.mmap, int]] = {}

    def copy(
        self, file: DirectFile, address: int, segment: tuple[int, int], offset: int, nbytes: int
    ) -> None:
        """Copy `nbytes` at `offset` of a file's segment (where it begins, its bytes) to `address`. Raises ReadError."""
        done = 0
        while done < nbytes:
            number, skip = divmod(offset + done, _CHUNK)
            self._want(file, segment, number)
            source = self._chunks[file, segment, number].result()
            count = min(nbytes - done, _CHUNK - skip)
            ctypes.memmove(address + done, source + skip, count)
            done += count

    def _want(self, file: DirectFile, segment: tuple[int, int], number: int) -> None:
        """Have a chunk and those after it read; those of elsewhere are given up."""
        begin, size = segment
        wanted = [(file, segment, n) for n in range(number, min(number + _AHEAD + 1, -(-size // _CHUNK)))]
        for key in [key for key in self._chunks if key not in wanted]:
            self._chunks.pop(key).exception()  # its buffer is written to until then
            self._free.append(self._buffers.pop(key))
        for key in wanted:
            if key not in self._chunks:
                self._buffers[key] = self._free.pop()
                at, n = begin + key[2] * _CHUNK, min(_CHUNK, size - key[2] * _CHUNK)
                self._chunks[key] = self._threads.submit(_read, file, self._buffers[key][1], at, n)

    def close(self) -> None:
        """Wait for what is under way, and give the memory back."""
        self._threads.shutdown()
        self._chunks.clear()
        self._buffers.clear()
        self._free.clear()


def _read(file: DirectFile, buffer: int, offset: int, nbytes: int) -> int:
    """Where the bytes are: as the buffer begins at a page, they miss one as they do in the file."""
    address = buffer + offset % file.align
    file.read_enclosing(address, offset, nbytes)
    return address
