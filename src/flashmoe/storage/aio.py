"""Queues of reads that run on their own: Linux's own asynchronous I/O, and threads where that does not work.

With `KernelQueue` a batch of reads costs one system call, no thread wakes up while they run, and their ends are
collected by the thread that waits: where every core computes, waking up a thread for a read costs more than the read.
It needs direct I/O; a read of a buffered file would happen inside the submitting call.
"""

from __future__ import annotations

import ctypes as C
import errno
import logging
import os
import platform
import struct
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol

from flashmoe.storage.direct import DirectFile

_log = logging.getLogger(__name__)

_THREADS = 4


#: Puts bytes that were read into a slot, in a layout of the engine's: (address of the bytes, address of the slot).
Place = Callable[[int, int], None]


class Read(NamedTuple):
    """`nbytes` at `offset` of file number `file`, to memory at `address` (slack around it: see DirectFile).

    With `place` the bytes are read aside, and `place` puts them to `address`: see ExpertReader. own_slot: the slack
    before them is theirs alone and begins at a multiple of the file's unit, so that they may arrive before their place
    and be moved, where the drive wants another address.
    """

    file: int
    offset: int
    nbytes: int
    address: int
    place: Place | None = None
    own_slot: bool = False


#: The end of a read: the number it was started with, and what went wrong.
Done = tuple[int, Exception | None]


class ReadQueue(Protocol):
    """Reads under way, each known by a number that its starter chose."""

    depth: int  # most reads under way at once

    def start(self, reads: list[tuple[int, Read]]) -> None:
        """Start reads; with those under way at most `depth`."""

    def collect(self, timeout: float, least: int = 1) -> list[Done]:
        """Reads that have ended since; where none has, wait up to `timeout` seconds for one, or for `least`."""

    def close(self) -> None:
        """End; no read may be under way."""


class ThreadQueue:
    """A `ReadQueue` of a few threads with preadv, for files that cannot be read directly, and for reads again."""

    def __init__(self, files: list[DirectFile]) -> None:
        self.depth = _THREADS
        self._files = files
        self._todo: SimpleQueue[tuple[int, Read] | None] = SimpleQueue()
        self._done: SimpleQueue[Done] = SimpleQueue()
        for i in range(_THREADS):  # daemons: one that hangs in a read must not keep the program from ending
            threading.Thread(target=self._work, name=f"flashmoe-read-{i}", daemon=True).start()

    def start(self, reads: list[tuple[int, Read]]) -> None:
        for item in reads:
            self._todo.put(item)

    def _work(self) -> None:
        while (item := self._todo.get()) is not None:
            number, read = item
            error: Exception | None = None
            try:
                self._files[read.file].read_enclosing(read.address, read.offset, read.nbytes)
            except Exception as caught:  # handed to the thread that waits
                error = caught
            self._done.put((number, error))

    def collect(self, timeout: float, least: int = 1) -> list[Done]:
        """See ReadQueue; `least` is not looked at."""
        ended = []
        try:
            ended.append(self._done.get(timeout=timeout) if timeout > 0 else self._done.get_nowait())
            while True:
                ended.append(self._done.get_nowait())
        except Empty:
            return ended

    def close(self) -> None:
        for _ in range(_THREADS):
            self._todo.put(None)


# io_setup, io_destroy, io_submit, io_getevents: glibc has no functions for them
_SYSCALLS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4)}
# struct iocb and struct io_event of linux/aio_abi.h, little-endian
_CONTROL_BLOCK = struct.Struct("<Q8xHxxIQQq16x")  # data, opcode, file, buffer, bytes, offset
_EVENT = struct.Struct("<Q8xq8x")  # data, result
_PREAD = 0
_DEPTH = 128
_TURN = 1e-3  # seconds that one of two queues is waited for


class KernelQueue:
    """A `ReadQueue` of Linux asynchronous I/O (io_submit), on files that are open for direct I/O."""

    depth = _DEPTH

    def __init__(self, files: list[DirectFile]) -> None:
        """Raises OSError where the system does not offer it."""
        self._files = files
        self._call = C.CDLL(None, use_errno=True).syscall
        self._call.restype, self._call.argtypes = C.c_long, [C.c_long] * 6
        try:
            self._setup, self._destroy, self._submit, self._getevents = _SYSCALLS[platform.machine()]
        except KeyError:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
        context = C.c_ulong(0)
        self._checked(self._setup, _DEPTH, C.addressof(context))
        self._context = context.value
        self._blocks = C.create_string_buffer(_DEPTH * _CONTROL_BLOCK.size)
        self._first = C.addressof(self._blocks)
        self._pointers = (C.c_uint64 * _DEPTH)()
        self._events = C.create_string_buffer(_DEPTH * _EVENT.size)
        self._seen = memoryview(self._events)
        self._timeout = (C.c_long * 2)()  # struct timespec
        self._free = list(range(_DEPTH))
        # block -> number, read, bytes wanted at least, and how far before their place they arrive
        self._under_way: dict[int, tuple[int, Read, int, int]] = {}
        self._fallback: ThreadQueue | None = None  # for what cannot go this way, or has failed
        self._fallen_back = 0  # reads that it has
        self._refusal_logged = False

    def start(self, reads: list[tuple[int, Read]]) -> None:
        started: list[int] = []
        for number, read in reads:
            file = self._files[read.file]
            head = read.offset % file.align
            early = (read.address - head) % file.align_memory
            moved = early and not (read.own_slot and file.align_memory <= file.align)
            if moved or not file.direct:  # buffered, the read would happen here and now
                self._read_plainly(number, read)
                continue
            index = self._free.pop()
            length = -(-(head + read.nbytes) // file.align) * file.align
            block = _CONTROL_BLOCK.size * index
            _CONTROL_BLOCK.pack_into(
                self._blocks,
                block,
                index,
                _PREAD,
                file.fd,
                read.address - head - early,
                length,
                read.offset - head,
            )
            self._under_way[index] = number, read, head + read.nbytes, early
            self._pointers[len(started)] = self._first + block
            started.append(index)
        done = 0
        while done < len(started):
            left = C.addressof(self._pointers) + 8 * done
            try:
                done += self._checked(self._submit, self._context, len(started) - done, left)
            except OSError as error:
                # this one is refused: the plain way knows whether for good, and says why
                if not self._refusal_logged:  # some systems refuse all
                    _log.warning("io_submit refuses reads (%s): such are left to threads", error.strerror)
                    self._refusal_logged = True
                number, read, *_ = self._release(started[done])
                self._read_plainly(number, read)
                done += 1

    def collect(self, timeout: float, least: int = 1) -> list[Done]:
        ended: list[Done] = []
        until = time.monotonic() + timeout
        while True:
            left = max(0.0, until - time.monotonic())
            both = self._under_way and self._fallen_back
            if self._under_way:
                ended += self._events_of(min(left, _TURN) if both else left, least)
            if self._fallback and self._fallen_back:
                done = self._fallback.collect(0 if both or ended else left)
                self._fallen_back -= len(done)
                ended += done
            if ended or not left:
                return ended

    def _events_of(self, timeout: float, least: int) -> list[Done]:
        """Reads that have ended well; others are handed on."""
        self._timeout[0] = int(timeout)
        self._timeout[1] = int(timeout % 1 * 1e9)
        count = self._checked(
            self._getevents,
            self._context,
            min(least, len(self._under_way)) if timeout > 0 else 0,
            _DEPTH,
            C.addressof(self._events),
            C.addressof(self._timeout),
        )
        ended: list[Done] = []
        for index, result in _EVENT.iter_unpack(self._seen[: count * _EVENT.size]):
            number, read, wanted, early = self._release(index)
            if result >= wanted:
                if early:
                    C.memmove(read.address, read.address - early, read.nbytes)
                ended.append((number, None))
            else:  # an error or a short read: the plain way retries, goes on, or says what is wrong
                _log.warning(
                    "%s: a read of %d bytes at byte %d ended with %s: reading again",
                    self._files[read.file].path,
                    read.nbytes,
                    read.offset,
                    f"{result} bytes" if result >= 0 else os.strerror(-result),
                )
                self._read_plainly(number, read)
        return ended

    def close(self) -> None:
        self._call(self._destroy, self._context, 0, 0, 0, 0)
        if self._fallback:
            self._fallback.close()

    def _release(self, index: int) -> tuple[int, Read, int, int]:
        self._free.append(index)
        return self._under_way.pop(index)

    def _read_plainly(self, number: int, read: Read) -> None:
        if self._fallback is None:
            self._fallback = ThreadQueue(self._files)
        self._fallen_back += 1
        self._fallback.start([(number, read)])

    def _checked(self, number: int, a: int, b: int = 0, c: int = 0, d: int = 0, e: int = 0) -> int:
        """A system call, repeated when a signal interrupts it. Raises OSError."""
        while True:
            result = int(self._call(number, a, b, c, d, e))
            if result >= 0:
                return result
            if C.get_errno() != errno.EINTR:
                raise OSError(C.get_errno(), os.strerror(C.get_errno()))


def open_queue(files: list[DirectFile]) -> ReadQueue:
    """The best queue that works for these files on this system."""
    if all(file.direct for file in files):
        try:
            return KernelQueue(files)
        except OSError as error:
            _log.warning("no io_submit on this system (%s): reading with threads", error.strerror)
    else:
        _log.warning("not all files can be read directly: reading with threads")
    return ThreadQueue(files)
