"""Commits a pool's memory in the background: touching it first while reading costs more than the read itself.

Compute threads spin while they wait for each other: a thread of the least priority would hardly run beside them, and
one that takes a core stops them all. So the thread has a usual priority, works as long as reads are close behind it or
no token is decoded, and else rests most of the time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from mmap import PAGESIZE

from flashmoe.storage.addresses import absent_bytes, commit, give_back

_STEP = 2 << 20  # bytes; small: page faults of other threads may have to wait for its end
_LEAD = 256 << 20  # bytes, of all regions: what drives read in some 50 ms
_RESTS = 20  # times as long as it works, where reads are so far behind
_PAUSE = 0.02  # seconds between two looks whether they are


class Prefault:
    """Commits regions of reserved memory, each up to a bound: what is beyond may be given back, and taken again."""

    def __init__(self, regions: Sequence[tuple[int, int]]) -> None:
        """regions: address and bytes of each, from a page's beginning on."""
        self._addresses = [address for address, _ in regions]
        self._bounds = [nbytes for _, nbytes in regions]
        self._done = [0] * len(regions)
        self._reached = [0] * len(regions)  # what reads go to
        self._lock = threading.Lock()  # held while memory is committed or given back
        #: Whether it may take a core: no token is decoded.
        self.idle: Callable[[], bool] = lambda: False
        self._lead = max(_STEP, _LEAD // max(1, len(regions)))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def absent(self) -> int:
        """Bytes within the bounds that are not committed yet."""
        return sum(map(absent_bytes, self._addresses, self._bounds))

    def start(self) -> None:
        """Commit what is not yet, from here on."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="flashmoe-prefault", daemon=True)
            self._thread.start()

    def bound(self, region: int, nbytes: int) -> None:
        """Use the first `nbytes` of a region only; the memory behind is given back."""
        with self._lock:
            before, self._bounds[region] = self._bounds[region], nbytes
            self._done[region] = min(self._done[region], nbytes) // PAGESIZE * PAGESIZE
            self._reached[region] = min(self._reached[region], nbytes)
            if nbytes < before:
                give_back(self._addresses[region] + nbytes, before - nbytes)

    def reach(self, region: int, nbytes: int) -> None:
        """Reads go to the first `nbytes` of a region from here on."""
        self._reached[region] = nbytes

    @property
    def far_ahead(self) -> bool:
        """Whether it is long before reads get to memory that is not committed."""
        return all(
            done >= min(bound, reached + self._lead)
            for done, bound, reached in zip(self._done, self._bounds, self._reached, strict=True)
        )

    def join(self) -> None:
        """Wait until everything is committed, or that has failed."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """End."""
        self._stop.set()
        self.join()

    def _run(self) -> None:
        # region by region in steps, all regions at the same pace: low slots are taken first
        began = time.perf_counter()
        while self._go_on():
            rest = _RESTS * (time.perf_counter() - began)
            while rest > 0 and self.far_ahead and not self.idle() and not self._stop.wait(min(rest, _PAUSE)):
                rest -= _PAUSE
            began = time.perf_counter()

    def _go_on(self) -> bool:
        """Commit a step of each region; whether anything is left to do."""
        went_on = False
        for region, address in enumerate(self._addresses):
            with self._lock:
                done = self._done[region]
                step = min(_STEP, self._bounds[region] - done)
                if self._stop.is_set() or (step > 0 and not commit(address + done, step)):
                    return False
                if step > 0:
                    self._done[region] = done + step
                    went_on = True
        return went_on
