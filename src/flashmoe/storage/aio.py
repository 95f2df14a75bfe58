"""Queues of reads that run while nobody looks: Linux's own asynchronous I/O, and threads where that does not work.

With `KernelQueue` a batch of reads costs one system call, no thread wakes up while they run, and their ends are
collected when somebody waits: where every core computes, a thread that wakes up for a read costs more than the read.
It needs direct I/O; a read of a buffered file would happen inside the submitting call.
"""

from __future__ import annotations

import ctypes as C
import errno
import os
import platform
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple, Protocol

import numpy as np

from flashmoe.storage.direct import DirectFile

_THREADS = 4


class Read(NamedTuple):
    """`nbytes` at `offset` of file number `file`, to memory at `address` (slack around it: see DirectFile)."""

    file: int
    offset: int
    nbytes: int
    address: int


#: The end of a read: the number it was started with, and what went wrong.
Done = tuple[int, Exception | None]


class ReadQueue(Protocol):
    """Reads under way, each known by a number that its starter chose."""

    depth: int  # most reads under way at once

    def start(self, reads: list[tuple[int, Read]]) -> None:
        """Start reads; with those under way at most `depth`."""
        ...

    def collect(self, wait: bool) -> list[Done]:
        """Reads that have ended since; with `wait` at least one (there must be one under way)."""
        ...

    def close(self) -> None:
        """Wait for what is under way, and end."""
        ...


class ThreadQueue:
    """A few threads with preadv, for files that cannot be read directly."""

    def __init__(self, files: list[DirectFile]) -> None:
        self.depth = _THREADS
        self._files = files
        self._pool = ThreadPoolExecutor(_THREADS, "flashmoe-read")
        self._done: SimpleQueue[Done] = SimpleQueue()

    def start(self, reads: list[tuple[int, Read]]) -> None:
        """See ReadQueue."""
        for number, read in reads:
            future = self._pool.submit(
                self._files[read.file].read_enclosing, read.address, read.offset, read.nbytes
            )
            future.add_done_callback(lambda future, number=number: self._end(number, future))  # type: ignore[misc]

    def _end(self, number: int, future: Future[None]) -> None:
        error = future.exception()
        self._done.put((number, error if isinstance(error, Exception) else None))

    def collect(self, wait: bool) -> list[Done]:
        """See ReadQueue."""
        ended = [self._done.get()] if wait else []
        while not self._done.empty():
            ended.append(self._done.get())
        return ended

    def close(self) -> None:
        """See ReadQueue."""
        self._pool.shutdown()


# io_setup, io_destroy, io_submit, io_getevents: glibc has no functions for them
_SYSCALLS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4)}
_CONTROL_BLOCK = np.dtype(
    {
        "names": ["data", "opcode", "file", "buffer", "nbytes", "offset"],
        "formats": ["u8", "u2", "u4", "u8", "u8", "i8"],
        "offsets": [0, 16, 20, 24, 32, 40],
        "itemsize": 64,
    }
)  # struct iocb of linux/aio_abi.h, little-endian; the rest stays 0, and so does opcode: IOCB_CMD_PREAD
_EVENT = np.dtype([("data", "u8"), ("block", "u8"), ("result", "i8"), ("result2", "i8")])  # struct io_event
_DEPTH = 128


class KernelQueue:
    """Linux asynchronous I/O (io_submit) on files that are open for direct I/O."""

    depth = _DEPTH

    def __init__(self, files: list[DirectFile]) -> None:
        """Raises OSError where the system does not offer it."""
        self._files = files
        self._call = C.CDLL(None, use_errno=True).syscall
        self._call.restype = C.c_long
        try:
            self._setup, self._destroy, self._submit, self._getevents = _SYSCALLS[platform.machine()]
        except KeyError:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
        self._context = C.c_ulong(0)
        self._checked(self._setup, C.c_long(_DEPTH), C.byref(self._context))
        self._blocks = np.zeros(_DEPTH, _CONTROL_BLOCK)
        self._pointers = np.zeros(_DEPTH, np.uint64)
        self._events = np.zeros(_DEPTH, _EVENT)
        self._first = self._blocks.ctypes.data
        self._free = list(range(_DEPTH))
        self._under_way: dict[int, tuple[int, Read, int]] = {}  # block -> number, read, bytes wanted at least
        self._ended: list[Done] = []

    def start(self, reads: list[tuple[int, Read]]) -> None:
        """See ReadQueue. What cannot go this way (a misaligned address) is read at once."""
        started = []
        for number, read in reads:
            file = self._files[read.file]
            head = read.offset % file.align
            if (read.address - head) % file.align_memory:
                self._read_now(number, read)
                continue
            index = self._free.pop()
            length = -(-(head + read.nbytes) // file.align) * file.align
            self._blocks[index] = (index, 0, file.fd, read.address - head, length, read.offset - head)
            self._under_way[index] = number, read, head + read.nbytes
            started.append(index)
        self._pointers[: len(started)] = [self._first + 64 * index for index in started]
        done = 0
        while done < len(started):
            try:
                done += self._checked(
                    self._submit,
                    self._context,
                    C.c_long(len(started) - done),
                    C.c_void_p(self._pointers.ctypes.data + 8 * done),
                )
            except OSError:  # this one is refused: the plain way knows whether for good, and says why
                number, read, _ = self._release(started[done])
                self._read_now(number, read)
                done += 1

    def collect(self, wait: bool) -> list[Done]:
        """See ReadQueue."""
        if self._under_way:
            least = int(wait and not self._ended)
            timeout = None if least else C.byref((C.c_long * 2)(0, 0))
            count = self._checked(
                self._getevents,
                self._context,
                C.c_long(least),
                C.c_long(_DEPTH),
                C.c_void_p(self._events.ctypes.data),
                timeout,
            )
            for index, _, result, _ in self._events[:count].tolist():
                number, read, wanted = self._release(index)
                if result >= wanted:
                    self._ended.append((number, None))
                else:  # an error or a short read: the plain way retries, goes on, or says what is wrong
                    self._read_now(number, read)
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """See ReadQueue."""
        self._call(C.c_long(self._destroy), self._context)

    def _release(self, index: int) -> tuple[int, Read, int]:
        self._free.append(index)
        return self._under_way.pop(index)

    def _read_now(self, number: int, read: Read) -> None:
        error: Exception | None = None
        try:
            self._files[read.file].read_enclosing(read.address, read.offset, read.nbytes)
        except Exception as caught:  # handed to whoever waits
            error = caught
        self._ended.append((number, error))

    def _checked(self, number: int, *args: object) -> int:
        """A system call, repeated when a signal interrupts it. Raises OSError."""
        while True:
            result = int(self._call(C.c_long(number), *args))
            if result >= 0:
                return result
            if C.get_errno() != errno.EINTR:
                raise OSError(C.get_errno(), os.strerror(C.get_errno()))


def open_queue(files: list[DirectFile]) -> ReadQueue:
    """The best queue that works for these files on this system."""
    if all(file.direct for file in files):
        try:
            return KernelQueue(files)
        except OSError:
            pass
    return ThreadQueue(files)
