"""Compute threads spin while they wait for each other, and sleep instead while other programs want the cores.

A layer has dozens of short operations, after each of which the threads wait for each other: those that spin go on at
once. But where one has lost its core to another program, the others spin away the time that it needs. OpenMP has no
call to change that while it runs; GNU's goes by numbers: with more threads than cores, all of them sleep almost at
once. So while the cores are contended there is a second team of threads, which does nothing.
"""

from __future__ import annotations

import ctypes as C
import os
import threading
import time
from contextlib import suppress

from flashmoe.common.machine import seconds_without_core
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.stack import threads_to_be_had

_LOOK = 0.5  # seconds between two looks
# What this process's threads have waited for a core, all together, per second: from where on threads sleep, and below
# which they spin again
_CONTENDED, _FREE = 0.2, 0.05
_SOFT = 1  # omp_pause_soft


class Spinning:
    """Watches whether the cores are contended, in a thread, until `close`; for `threads` compute threads.

    Does nothing with another OpenMP than GNU's, or where OMP_WAIT_POLICY says how to wait.
    """

    def __init__(self, lib: Library, threads: int) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if threads > 1 and lib.openmp and "OMP_WAIT_POLICY" not in os.environ:
            try:
                more = lib.openmp_runtime.omp_get_num_procs() - threads + 1
                self._team = Team(lib.openmp_runtime, max(1, more))
            except AttributeError:
                return
            self._thread = threading.Thread(target=self._run, name="flashmoe-spinning", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        waited, at = seconds_without_core(), time.monotonic()
        while not self._stop.wait(_LOOK):
            before, since = waited, at
            waited, at = seconds_without_core(), time.monotonic()
            share = (waited - before) / (at - since)
            if share > _CONTENDED:
                self._team.assemble()
            elif share < _FREE:
                self._team.dismiss()
        self._team.dismiss()

    def close(self) -> None:
        """End the watch; threads spin."""
        self._stop.set()
        if self._thread:
            self._thread.join()


def release_threads(lib: Library) -> None:
    """End the threads that OpenMP keeps for the calling one: with those of another they would be more than cores."""
    with suppress(AttributeError):
        lib.openmp_runtime.omp_pause_resource_all(_SOFT)


class Team:
    """Threads of OpenMP's, `size` of them when they are assembled, that sleep."""

    def __init__(self, openmp: C.CDLL, size: int) -> None:
        """Raises AttributeError where it is not GNU's OpenMP."""
        self._start, self._size = openmp.GOMP_parallel, size
        self._start.argtypes, self._start.restype = [C.c_void_p, C.c_void_p, C.c_uint, C.c_uint], None
        self._nothing = C.cast(C.CDLL(None).free, C.c_void_p)  # of no address: a function that does nothing
        self._dismissed = threading.Event()
        self._leader: threading.Thread | None = None

    def assemble(self) -> None:
        """Start the threads, where they are not there already, and the system allows them."""
        if self._leader is None and threads_to_be_had(self._size + 1) > self._size:
            assembled = threading.Event()
            self._dismissed.clear()
            self._leader = threading.Thread(
                target=self._lead, args=(assembled,), name="flashmoe-team", daemon=True
            )
            self._leader.start()
            assembled.wait()

    def _lead(self, assembled: threading.Event) -> None:
        self._start(self._nothing, None, self._size + 1, 0)  # this thread is one of them
        assembled.set()
        self._dismissed.wait()

    def dismiss(self) -> None:
        """End the threads: they end with the one that has started them."""
        if self._leader is not None:
            self._dismissed.set()
            self._leader.join()
            self._leader = None
