"""Reads expert slices in the background: demand reads first, then what was asked for ahead of time."""

from __future__ import annotations

import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from mmap import PAGESIZE
from pathlib import Path
from typing import Protocol

from flashmoe.common.signals import SafeLock, let_through
from flashmoe.errors import ReadError
from flashmoe.storage.addresses import reserve_huge
from flashmoe.storage.aio import Read, open_queue
from flashmoe.storage.direct import DirectFile
from flashmoe.storage.pump import Pump

__all__ = ["ExpertReader", "Read", "Ticket"]

TIMEOUT = 30.0  # seconds without an answer after which a drive counts as hanging
_CHECKED_DEPTH = 8  # reads under way
_LAST_LOOK = 1.0  # seconds; this process may have been stopped meanwhile, not the drive
_LOOK = 0.1  # seconds between looks for signals

# Readers closed while their drive hung, with the memory that it may still write to: kept for good
_ABANDONED: list[ExpertReader] = []

# Buffers for reads that are placed: enough to keep a drive busy, few enough that the reads end one after the other, so
# that one is placed while others run
_BOUNCE_BYTES = 5 << 20
_LEAST_BOUNCE, _MOST_BOUNCE = 4, 32


#: Looks at the bytes of a read, which are at an address: what is wrong with them.
Check = Callable[[Read, int], ReadError | None]
#: What a read is for, in words; "" where that is not known.
Describe = Callable[[Read], str]


class Ticket:
    """A batch of reads under way; `ExpertReader.wait` returns when every byte is in."""

    __slots__ = ("bytes", "error", "files", "pending", "started")

    def __init__(self, reads: Sequence[Read]) -> None:
        self.pending = len(reads)
        self.started = False  # a read has begun
        self.bytes = 0  # read so far
        self.files: set[int] = set()  # numbers of those that are read
        self.error: Exception | None = None  # the first

    @property
    def done(self) -> bool:
        """Whether all reads have ended, as far as the reader has looked (`poll`)."""
        return self.pending == 0


class ReadObserver(Protocol):
    """Sees reads begin and end, and the reader being waited for."""

    def started(self, number: int, read: Read, urgent: bool) -> None:
        """A read begins, known by `number`; urgent: a demand read."""

    def ended(self, number: int) -> None:
        """Its end has been seen, by whatever called the reader next."""

    def waits(self) -> None:
        """The caller of `wait` begins to wait."""

    def waited(self) -> None:
        """It has waited."""


class ExpertReader:
    """Reads from a model's files without a thread of its own in the way (see storage.aio).

    Reads make progress on their own as far as the queue is deep; beyond that, whenever a method is called, or in a
    thread where the caller asks for that (`go_on`). Reads with a `place` go to bounce buffers; the bytes are placed by
    the thread that sees that they are in. Thread-safe.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._lock = SafeLock()
        self._demand: deque[tuple[Ticket, Read]] = deque()
        self._prefetch: deque[tuple[Ticket, Read]] = deque()
        self._under_way: dict[int, tuple[Ticket, Read]] = {}
        self._urgent: set[int] = set()  # of those, the demand reads
        self._number = 0
        self._depth, self._chunk = sys.maxsize, 0
        self._heard = time.monotonic()  # when the drive has last answered, or was last asked
        self._given_up: dict[int, Read] = {}  # under way, and not waited for any more
        self._memory: list[object] = []
        self._bounce: list[int] = []  # addresses of free buffers
        self._kept = 0  # of them, for demand reads
        self._lent: dict[int, tuple[int, int]] = {}  # read under way -> its buffer, where in it the bytes go
        self._check: Check | None = None
        self._background = Pump(self._go_on)
        #: Names in errors what could not be read.
        self.describe: Describe = lambda _: ""
        #: Of benchmarks.
        self.observer: ReadObserver | None = None
        with ExitStack() as undo:
            self.files: list[DirectFile] = []
            for path in files:
                self.files.append(DirectFile(path))
                undo.callback(self.files[-1].close)
            self._queue = open_queue(self.files)
            undo.pop_all()

    def keep(self, memory: object) -> None:
        """Memory that reads go to: it lives as long as the reader, and longer where a read never ends."""
        self._memory.append(memory)

    @property
    def direct(self) -> bool:
        """Whether every file is read past the page cache."""
        return all(file.direct for file in self.files)

    @property
    def hangs(self) -> bool:
        """Whether reads that were given up may still write to their memory."""
        return bool(self._given_up)

    def reserve_bounce_buffers(self, nbytes: int) -> int:
        """Make buffers for reads with a `place`, of up to `nbytes` each; the memory that they take. Call it once."""
        unit = 2 * max(file.align for file in self.files)
        size = -(-(nbytes + unit) // PAGESIZE) * PAGESIZE
        count = max(_LEAST_BOUNCE, min(_MOST_BOUNCE, _BOUNCE_BYTES // size))
        memory, start = reserve_huge(count * size)
        self.keep(memory)
        self._bounce = [start + i * size for i in range(count)]
        self._kept = count // 4
        return count * size

    def check(self, check: Check) -> None:
        """Let `check` see the bytes of every read before they are used; call it after `tune`.

        Reads are whole weights from here on, and few enough at once that some end while others run: a drive may answer
        all that it was asked together, and would have nothing to read while their bytes are checked.
        """
        self._check, self._depth = check, min(self._depth, _CHECKED_DEPTH)

    def tune(self, depth: int, chunk: int) -> None:
        """Keep at most `depth` reads under way, of `chunk` bytes each (0: as long as they come). See storage.disk."""
        self._depth, self._chunk = depth, chunk

    def demand(self, reads: Sequence[Read]) -> Ticket:
        """Start reads that are waited for next."""
        return self._submit([reads], self._demand)[0]

    def demand_in_order(self, batches: Sequence[Sequence[Read]], tickets: list[Ticket]) -> list[Ticket]:
        """The same for several batches, the first to be waited for in front: one call of the system starts them all.

        `tickets` is extended by theirs before any read begins, for the case that something is raised.
        """
        return self._submit(batches, self._demand, tickets)

    def prefetch(self, reads: Sequence[Read]) -> Ticket:
        """Queue reads that are not waited for yet: they start when no demand read is queued or under way."""
        return self._submit([reads], self._prefetch)[0]

    def promote(self, ticket: Ticket) -> None:
        """Make demand reads of a prefetch: other prefetches wait for what is under way of it, too."""
        with self._lock:
            waiting = self._withdraw(ticket)
            self._demand.extend(waiting)
            self._urgent.update(number for number, (owner, _) in self._under_way.items() if owner is ticket)
            self._pump()

    def cancel(self, ticket: Ticket) -> None:
        """Drop what has not started of a prefetch; the ticket is done when the rest has ended."""
        with self._lock:
            ticket.pending -= len(self._withdraw(ticket))

    def poll(self) -> None:
        """See what has ended, without waiting."""
        with self._lock:
            if self._under_way:
                self._collect(0)

    def wait(self, ticket: Ticket) -> None:
        """Return when the reads of a ticket have ended. Raises the first ReadError, or that the drive hangs.

        Handlers of signals may raise meanwhile.
        """
        if self.observer:
            self.observer.waits()
        while not self._look(ticket):
            let_through()
        if self.observer:
            self.observer.waited()
        if ticket.error:
            raise ticket.error
        for number in ticket.files:
            self.files[number].check_unchanged()

    def settle(self, ticket: Ticket) -> None:
        """Return when the reads of a ticket have ended, well or not, or the drive is silent for TIMEOUT seconds.

        In the latter case the ticket has failed. What has not begun never will; what has begun may still end, and until
        then nothing else is read into its memory: its slots may be given to others.
        """
        while not self._look(ticket):
            pass

    def _look(self, ticket: Ticket) -> bool:
        """Wait for a moment; whether the ticket is done, or has been given up."""
        with self._lock:
            if ticket.done:
                return True
            left = self._heard + TIMEOUT - time.monotonic()
            # bytes that are to be looked at or placed are so while others come in
            least = 1 if self._demand or self._lent or self._check else ticket.pending
            if not self._collect(min(left, _LOOK) if left > 0 else _LAST_LOOK, least) and left <= 0:
                self._give_up(ticket)
                return True
            return ticket.done

    def go_on(self) -> None:
        """Start what is queued as reads end, in a thread, until nothing is queued: the caller is about to compute."""
        if self._prefetch:
            self._background.start()

    def _go_on(self) -> bool:
        with self._lock:
            if self._under_way:
                self._collect(0)
            return bool(self._prefetch and self._under_way)

    def close(self) -> None:
        """Drop what is queued, wait for what is under way as long as `settle` does, and close the files."""
        self._background.close()
        with self._lock:
            self._demand.clear()
            self._prefetch.clear()
            while self._under_way:
                left = self._heard + TIMEOUT - time.monotonic()
                if not self._collect(max(left, _LAST_LOOK)) and left <= 0:
                    _ABANDONED.append(self)
                    return
            self._memory.clear()
            self._queue.close()
            for file in self.files:
                file.close()

    def _give_up(self, ticket: Ticket) -> None:
        waiting = self._withdraw(ticket)
        ticket.pending -= len(waiting)
        self._given_up = {number: read for number, (_, read) in self._under_way.items()}
        read = next(read for owner, read in (*self._under_way.values(), *waiting) if owner is ticket)
        ticket.error = ReadError(
            f"{self.files[read.file].path}: the drive has not answered for {TIMEOUT:.0f} s"
            f"{self._named(read)}; check the drive and its cable, "
            "the network where it is a remote one, and try again"
        )

    def _named(self, read: Read) -> str:
        what = self.describe(read)
        return f" (reading {what}: {read.nbytes} bytes at {read.offset})" if what else ""

    def _is_free(self, read: Read) -> bool:
        """Whether no read that was given up may still write where this one would."""
        return not any(
            read.address - slack < other.address + other.nbytes + slack
            and other.address - slack < read.address + read.nbytes + slack
            for other in self._given_up.values()
            for slack in [self.files[other.file].align]
        )

    def _submit(
        self,
        batches: Sequence[Sequence[Read]],
        queue: deque[tuple[Ticket, Read]],
        known: list[Ticket] | None = None,
    ) -> list[Ticket]:
        if self._chunk and not self._check:
            batches = [
                [piece for read in reads for piece in ([read] if read.place else self._pieces(read))]
                for reads in batches
            ]
        tickets = [Ticket(reads) for reads in batches]
        with self._lock:
            if known is not None:
                known += tickets
            for ticket, reads in zip(tickets, batches, strict=True):
                ticket.files = {read.file for read in reads}
                queue.extend((ticket, read) for read in reads)
            self._pump()
        return tickets

    def _pump(self) -> None:
        """Start as much as the queue takes."""
        room = min(self._depth, self._queue.depth) - len(self._under_way)
        started = []
        for queue in (self._demand, self._prefetch):
            if queue is self._prefetch and self._urgent:
                break
            kept, blocked = 0 if queue is self._demand else self._kept, []
            while queue and room > 0 and (queue[0][1].place is None or len(self._bounce) > kept):
                ticket, read = queue.popleft()
                if self._given_up and not self._is_free(read):
                    blocked.append((ticket, read))
                    continue
                ticket.started = True
                self._number += 1
                self._under_way[self._number] = ticket, read
                if queue is self._demand:
                    self._urgent.add(self._number)
                started.append((self._number, self._borrow(read)))
                room -= 1
            queue.extendleft(reversed(blocked))
        if started:
            self._heard = time.monotonic()
            if self.observer:
                for number, read in started:
                    self.observer.started(number, read, number in self._urgent)
            self._queue.start(started)

    def _pieces(self, read: Read) -> list[Read]:
        """A read, cut where the file's units end."""
        first, end = read.offset, read.offset + read.nbytes
        file = self.files[read.file]
        unit = file.align
        if (read.address - first % unit) % file.align_memory:  # it arrives elsewhere and is moved, as a whole
            return [read]
        edges = [first, *range(first - first % unit + self._chunk, end, self._chunk), end]
        return [
            read._replace(offset=a, nbytes=b - a, address=read.address + a - first)
            for a, b in itertools.pairwise(edges)
        ]

    def _borrow(self, read: Read) -> Read:
        """The read to start: one that is placed goes to a buffer."""
        if read.place is None:
            return read
        buffer = self._bounce.pop()
        address = buffer + read.offset % self.files[read.file].align
        self._lent[self._number] = buffer, address
        return read._replace(address=address)

    def _collect(self, timeout: float, least: int = 1) -> bool:
        """See what has ended, and start what is next; whether anything has."""
        ended = [(n, *self._under_way.pop(n), error) for n, error in self._queue.collect(timeout, least)]
        if ended:
            self._heard = time.monotonic()
        if self.observer:
            for number, *_ in ended:
                self.observer.ended(number)
        self._urgent.difference_update(number for number, *_ in ended)
        for number, ticket, read, error in ended:
            buffer, address = self._lent.pop(number, (0, read.address))
            if buffer or self._check:
                self._pump()  # the drive goes on meanwhile
            if isinstance(error, ReadError):
                error = ReadError(f"{error}{self._named(read)}")
            elif not error and number not in self._given_up:
                error = self._take_in(read, address)
            if buffer:
                self._bounce.append(buffer)
            self._given_up.pop(number, None)
            ticket.pending -= 1
            ticket.bytes += 0 if error else read.nbytes
            ticket.error = ticket.error or error
        self._pump()
        return bool(ended)

    def _take_in(self, read: Read, address: int) -> Exception | None:
        """Look at the bytes of a read, and place them; what is wrong with them."""
        try:
            error = self._check(read, address) if self._check else None
            if read.place and not error:
                read.place(address, read.address)
        except Exception as failed:  # its ticket has to end
            return failed
        return error

    def _withdraw(self, ticket: Ticket) -> list[tuple[Ticket, Read]]:
        """Take what has not started out of its queue."""
        taken = [item for queue in (self._prefetch, self._demand) for item in queue if item[0] is ticket]
        if taken:
            self._prefetch = deque(item for item in self._prefetch if item[0] is not ticket)
            self._demand = deque(item for item in self._demand if item[0] is not ticket)
        return taken
