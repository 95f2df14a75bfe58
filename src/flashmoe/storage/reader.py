"""A few threads that read expert slices: demand reads first, prefetches when nothing else waits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from flashmoe.storage.direct import DirectFile

DEFAULT_THREADS = 4


class Read(NamedTuple):
    """`nbytes` at `offset` of file number `file`, to memory at `address` (slack around it: see DirectFile)."""

    file: int
    offset: int
    nbytes: int
    address: int


class Ticket:
    """A batch of reads under way. `wait` returns when every byte is in, or raises the first ReadError."""

    __slots__ = ("_lock", "_pending", "cancelled", "done", "error", "reads")

    def __init__(self, reads: Sequence[Read]) -> None:
        self.reads = reads
        self.error: Exception | None = None
        self.cancelled = False
        self.done = threading.Event()
        self._pending = len(reads)
        self._lock = threading.Lock()
        if not reads:
            self.done.set()

    def finish_one(self, error: Exception | None) -> None:
        with self._lock:
            self.error = self.error or error
            self._pending -= 1
            if self._pending == 0:
                self.done.set()

    def wait(self) -> None:
        self.done.wait()
        if self.error:
            raise self.error


class ExpertReader:
    """Reads from a model's files on `threads` threads; preadv releases the GIL, so reads overlap with Python.

    Threads sleep while nothing is queued. The queue depth that the drive sees is the number of threads.
    """

    def __init__(self, files: Sequence[Path], threads: int = DEFAULT_THREADS) -> None:
        self.files = [DirectFile(path) for path in files]
        self._demand: deque[tuple[Ticket, Read]] = deque()
        self._prefetch: deque[tuple[Ticket, Read]] = deque()
        self._wake: SimpleQueue[bool] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"flashmoe-read-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def direct(self) -> bool:
        """Whether every file is read past the page cache."""
        return all(file.direct for file in self.files)

    def demand(self, reads: Sequence[Read]) -> Ticket:
        """Queue reads that somebody waits for."""
        return self._submit(reads, self._demand)

    def prefetch(self, reads: Sequence[Read]) -> Ticket:
        """Queue reads that start only while no demand read waits."""
        return self._submit(reads, self._prefetch)

    def promote(self, ticket: Ticket) -> None:
        """Move what is still queued of a prefetch ahead of all other prefetches."""
        for item in [item for item in list(self._prefetch) if item[0] is ticket]:
            try:
                self._prefetch.remove(item)
            except ValueError:  # a thread has just taken it
                continue
            self._demand.append(item)
            self._wake.put(True)  # a thread that looked between the two queues has lost its wake-up

    def cancel(self, ticket: Ticket) -> None:
        """Drop what has not started of a prefetch; `ticket.done` is set when the rest has ended."""
        ticket.cancelled = True

    def close(self) -> None:
        """End the threads (queued reads are dropped) and close the files."""
        self._demand.clear()
        self._prefetch.clear()
        for _ in self._threads:
            self._wake.put(False)
        for thread in self._threads:
            thread.join()
        for file in self.files:
            file.close()

    def _submit(self, reads: Sequence[Read], queue: deque[tuple[Ticket, Read]]) -> Ticket:
        ticket = Ticket(reads)
        queue.extend((ticket, read) for read in reads)
        for _ in reads:
            self._wake.put(True)
        return ticket

    def _take(self) -> tuple[Ticket, Read] | None:
        for queue in (self._demand, self._prefetch):
            with suppress(IndexError):  # empty, or another thread was faster
                return queue.popleft()
        return None

    def _work(self) -> None:
        while self._wake.get():
            item = self._take()
            if item is None:
                continue
            ticket, read = item
            error: Exception | None = None
            if not ticket.cancelled:
                try:
                    self.files[read.file].read_enclosing(read.address, read.offset, read.nbytes)
                except Exception as caught:  # handed to whoever waits
                    error = caught
            ticket.finish_one(error)
