"""Commits a pool's memory in the background: touching it first while reading costs more than the read itself."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from mmap import PAGESIZE

from flashmoe.storage.addresses import absent_bytes, commit, give_back

_STEP = 2 << 20  # bytes; small: page faults of other threads may have to wait for its end
_LEAST_PRIORITY = 19


class Prefault:
    """Commits regions of reserved memory, each up to a bound: what is beyond may be given back, and taken again."""

    def __init__(self, regions: Sequence[tuple[int, int]]) -> None:
        """regions: address and bytes of each, from a page's beginning on."""
        self._addresses = [address for address, _ in regions]
        self._bounds = [nbytes for _, nbytes in regions]
        self._done = [0] * len(regions)
        self._lock = threading.Lock()  # held while memory is committed or given back
        self._stop = False
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
            if nbytes < before:
                give_back(self._addresses[region] + nbytes, before - nbytes)

    def join(self) -> None:
        """Wait until everything is committed, or that has failed."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """End."""
        self._stop = True
        self.join()

    def _run(self) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own
            # compute threads spin for each other: one that has to give way to this thread stops them all
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
        # region by region in steps, all regions at the same pace: low slots are taken first
        while self._go_on():
            pass

    def _go_on(self) -> bool:
        """Commit a step of each region; whether anything is left to do."""
        went_on = False
        for region, address in enumerate(self._addresses):
            with self._lock:
                done = self._done[region]
                step = min(_STEP, self._bounds[region] - done)
                if self._stop or (step > 0 and not commit(address + done, step)):
                    return False
                if step > 0:
                    self._done[region] = done + step
                    went_on = True
        return went_on
