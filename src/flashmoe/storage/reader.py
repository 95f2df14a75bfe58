"""Reads expert slices in the background: demand reads first, then what was asked for ahead of time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from flashmoe.storage.aio import Read, open_queue
from flashmoe.storage.direct import DirectFile

__all__ = ["ExpertReader", "Read", "Ticket"]


class Ticket:
    """A batch of reads under way; `ExpertReader.wait` returns when every byte is in."""

    __slots__ = ("bytes", "error", "pending", "started")

    def __init__(self, reads: Sequence[Read]) -> None:
        self.pending = len(reads)
        self.started = False  # a read has begun
        self.bytes = 0  # read so far
        self.error: Exception | None = None  # the first

    @property
    def done(self) -> bool:
        """Whether all reads have ended, as far as the reader has looked (`poll`)."""
        return self.pending == 0


class ExpertReader:
    """Reads from a model's files without a thread of its own in the way (see storage.aio).

    Reads make progress on their own as far as the queue is deep; beyond that, whenever a method is called. Thread-safe.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = [DirectFile(path) for path in files]
        self._queue = open_queue(self.files)
        self._lock = threading.RLock()
        self._demand: deque[tuple[Ticket, Read]] = deque()
        self._prefetch: deque[tuple[Ticket, Read]] = deque()
        self._under_way: dict[int, tuple[Ticket, Read]] = {}
        self._urgent: set[int] = set()  # of those, the demand reads
        self._number = 0

    @property
    def direct(self) -> bool:
        """Whether every file is read past the page cache."""
        return all(file.direct for file in self.files)

    def demand(self, reads: Sequence[Read]) -> Ticket:
        """Start reads that somebody waits for."""
        return self._submit(reads, self._demand)

    def prefetch(self, reads: Sequence[Read]) -> Ticket:
        """Queue reads that nobody waits for yet: they start when no demand read is queued or under way."""
        return self._submit(reads, self._prefetch)

    def promote(self, ticket: Ticket) -> None:
        """Make demand reads of what has not started of a prefetch."""
        with self._lock:
            self._demand.extend(self._withdraw(ticket))
            self._pump()

    def cancel(self, ticket: Ticket) -> None:
        """Drop what has not started of a prefetch; the ticket is done when the rest has ended."""
        with self._lock:
            ticket.pending -= len(self._withdraw(ticket))

    def poll(self) -> None:
        """See what has ended, without waiting."""
        with self._lock:
            if self._under_way:
                self._collect(wait=False)

    def wait(self, ticket: Ticket) -> None:
        """Return when the reads of a ticket have ended. Raises the first ReadError."""
        self.settle(ticket)
        if ticket.error:
            raise ticket.error

    def settle(self, ticket: Ticket) -> None:
        """Return when the reads of a ticket have ended, well or not."""
        while not ticket.done:
            with self._lock:
                if not ticket.done:
                    self._collect(wait=True)

    def close(self) -> None:
        """Drop what is queued, wait for what is under way, and close the files."""
        with self._lock:
            self._demand.clear()
            self._prefetch.clear()
            self._queue.close()
            for file in self.files:
                file.close()

    def _submit(self, reads: Sequence[Read], queue: deque[tuple[Ticket, Read]]) -> Ticket:
        ticket = Ticket(reads)
        with self._lock:
            queue.extend((ticket, read) for read in reads)
            self._pump()
        return ticket

    def _pump(self) -> None:
        """Start as much as the queue takes."""
        room = self._queue.depth - len(self._under_way)
        started = []
        for queue in (self._demand, self._prefetch):
            if queue is self._prefetch and self._urgent:
                break
            while queue and room > 0:
                ticket, read = queue.popleft()
                ticket.started = True
                self._number += 1
                self._under_way[self._number] = ticket, read
                if queue is self._demand:
                    self._urgent.add(self._number)
                started.append((self._number, read))
                room -= 1
        if started:
            self._queue.start(started)

    def _collect(self, wait: bool) -> None:
        for number, error in self._queue.collect(wait):
            ticket, read = self._under_way.pop(number)
            self._urgent.discard(number)
            ticket.pending -= 1
            ticket.bytes += 0 if error else read.nbytes
            ticket.error = ticket.error or error
        self._pump()

    def _withdraw(self, ticket: Ticket) -> list[tuple[Ticket, Read]]:
        """Take what has not started of a prefetch out of the queue."""
        taken = [item for item in self._prefetch if item[0] is ticket]
        if taken:
            self._prefetch = deque(item for item in self._prefetch if item[0] is not ticket)
        return taken
