"""Python's signal handlers may raise (Ctrl-C does), in the main thread, between any two lines.

Nothing that keeps books can be written so that it is right whichever two lines that happens between. So what must not
be torn runs where no handler does: in another thread, while the main thread waits and can be interrupted (`run_apart`);
or, where the caller's thread is needed, with handlers held back until it is done (`SafeLock`).
"""

from __future__ import annotations

import _thread
import contextvars
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")

_LOOK = 0.1  # seconds between looks for signals
_ASK = 0.05  # seconds between requests to end


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


class _Held:
    """Handlers that are held back, of the main thread: there is one such thread."""

    def __init__(self) -> None:
        self.depth = 0
        self.handlers: dict[int, Any] = {}
        self.arrived: list[int] = []

    def begin(self) -> None:
        """Hold handlers back, if they are not; if a handler raises before that, they are not held back."""
        if self.depth:
            self.depth += 1
            return
        try:
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler) and handler != self.note:
                    self.handlers[number] = handler
                    signal.signal(number, self.note)
            self.depth = 1
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """The other side of `begin`: what has arrived since is handled, which may raise."""
        if self.depth > 1:
            self.depth -= 1
            return
        try:
            while self.handlers:
                number, handler = next(iter(self.handlers.items()))
                if len(self.handlers) == 1:  # from the last one on a handler may raise: all is done before
                    self.depth = 0
                    self.handlers.clear()
                    signal.signal(number, handler)
                else:
                    signal.signal(number, handler)
                    del self.handlers[number]
            self.depth = 0
            while self.arrived:
                signal.raise_signal(self.arrived.pop(0))
        except BaseException:  # a handler's
            if self.depth or self.handlers or self.arrived:
                self.end()
            raise

    def note(self, number: int, _frame: Any) -> None:
        self.arrived.append(number)

    def let_through(self) -> None:
        while self.arrived:
            number = self.arrived.pop(0)
            if number in self.handlers:
                self.handlers[number](number, sys._getframe())


_SIGNALS = sorted(signal.valid_signals())
_held = _Held()


def let_through() -> None:
    """At a place in a held section where raising does no harm: handle what has arrived, which may raise."""
    if _held.arrived and _in_main_thread():
        _held.let_through()


class SafeLock:
    """A reentrant lock; while the main thread has it, signal handlers are held back, see `let_through`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not _in_main_thread():
            self._lock.acquire()
            return
        _held.begin()
        try:
            while not self._lock.acquire(timeout=_LOOK):
                let_through()
        except BaseException:
            _held.end()
            raise

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if _in_main_thread():
            _held.end()


class _Job(Generic[Result]):
    """A function to be called once, by the worker."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function, self._context = function, contextvars.copy_context()
        self._begun = False  # the worker's own
        self.cancelled = self.ended = False
        self.result: Result | None = None
        self.error: BaseException | None = None
        self._waiting = _thread.allocate_lock()
        self._waiting.acquire()

    def run(self) -> None:
        if self._begun:
            return
        self._begun = True
        if not self.cancelled:
            try:
                self.result = self._context.run(self._function)
            except BaseException as error:
                self.error = error
        self.ended = True
        self._waiting.release()

    def wait(self, seconds: float) -> None:
        """Until it has ended, or so long; handlers may raise meanwhile."""
        if not self.ended:
            self._waiting.acquire(timeout=seconds)


class _Worker:
    """A thread that no signal handler runs in."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[_Job[Any]] = queue.SimpleQueue()
        self.process = os.getpid()
        threading.Thread(target=self._run, name="flashmoe-main", daemon=True).start()

    def _run(self) -> None:
        while True:
            self.jobs.get().run()


_worker: _Worker | None = None


def run_apart(function: Callable[[], Result], interrupt: Callable[[], None]) -> Result:
    """Call `function` where no signal handler can raise; returns what it returns, raises what it raises.

    In the main thread a handler may raise while the function is waited for: then `interrupt` is called, perhaps several
    times, to let the function end soon; when it has ended, what the handler has raised is raised.
    """
    global _worker
    if not _in_main_thread() or _held.depth:
        return function()
    if _worker is None or _worker.process != os.getpid():  # a forked process has no threads
        _worker = _Worker()
    job = _Job(function)
    try:
        _worker.jobs.put(job)
        while not job.ended:  # a signal that arrives just before a wait begins does not end it
            job.wait(_LOOK)
    except BaseException:
        if not job.ended:
            _end(_worker, job, interrupt)
        raise
    error, job.error = job.error, None
    try:
        if error is not None:
            raise error
    finally:
        del error  # its traceback holds this frame
    return job.result  # type: ignore[return-value]


def _end(worker: _Worker, job: _Job[Any], interrupt: Callable[[], None]) -> None:
    """A handler has raised: come back when the job is over, whatever other handlers raise meanwhile."""
    raised: BaseException | None = None
    while not job.ended:
        try:
            job.cancelled = True
            worker.jobs.put(job)  # perhaps it was not put: it runs once at most
            interrupt()
            job.wait(_ASK)
        except BaseException as error:
            raised = error
    if raised is not None:
        raise raised


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the program as Ctrl-C does: through the cleaning up. Ignored ones (nohup) stay so."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    wanted = [
        number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN
    ]
    try:
        before = {number: signal.signal(number, end) for number in wanted}
    except ValueError:  # not the main thread: signals are handled elsewhere
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
