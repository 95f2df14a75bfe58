"""Runs requests in turns over one model: a step of each (a micro-batch of its prompt, or one token), then the next.

Every request has a sequence of the engine for itself, with a KV cache of its own, and one sequence is evaluated at a
time: so its tokens are those that it would get alone. All share the expert pool. Requests beyond the number of
sequences wait, first come, first served.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from flashmoe.embedding import Embedding
from flashmoe.engines.base import Sampling
from flashmoe.errors import FlashMoEError
from flashmoe.generation import Generation, Reuse, Rule, Token, check_prompt
from flashmoe.model import Model

MOST_WAITING = 256  # requests; more are refused


class Unavailable(FlashMoEError):
    """The server cannot take or go on with a request: too many wait, or it is shutting down."""


class _Cancelled(Exception):
    """Ends the evaluation of a request whose client has gone."""


class Listener(Protocol):
    """Hears, in the engine's thread, what becomes of a job."""

    def token(self, token: Token) -> bool:
        """A token was made. Returns False where that is enough (a stop string)."""
        ...

    def done(self, job: Job) -> None:
        """All tokens are made."""
        ...

    def failed(self, error: BaseException) -> None:
        """There will be no more tokens."""
        ...


@dataclass
class Use:
    """What a job took of the expert cache."""

    hits: int = 0
    late_hits: int = 0
    misses: int = 0
    bytes: int = 0
    stall_seconds: float = 0.0


@dataclass(eq=False)
class Job:
    """One prompt to continue, or to embed. Times are of `time.perf_counter`, 0 where it has not happened."""

    prompt: Sequence[int]
    listener: Listener
    max_tokens: int = -1
    sampling: Sampling = field(default_factory=Sampling)
    rules: Sequence[Rule] = ()
    logprobs: int | None = None
    embed: bool = False
    generation: Generation | Embedding | None = None
    use: Use = field(default_factory=Use)
    outcome: str = ""  # "stop", "length", "cancelled" or "failed", when it has ended
    made: int = 0
    reused: int = 0
    submitted: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0


class Scheduler:
    """A thread that owns the model's engine. Other methods may be called from any thread."""

    def __init__(self, model: Model) -> None:
        self.model = model
        #: Called in the engine's thread when a job has ended.
        self.on_end: Callable[[Job], None] = lambda _: None
        self._free = deque(range(model.engine.sequences))
        self._waiting: deque[Job] = deque()
        self._running: deque[Job] = deque()
        self._current: Job | None = None
        self._refusing = self._closing = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="flashmoe-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job. Raises UsageError for a prompt that does not fit, and Unavailable."""
        check_prompt(job.prompt, self.model.engine.n_ctx)
        with self._change:
            if self._refusing:
                raise Unavailable("the server is shutting down")
            if len(self._waiting) >= MOST_WAITING:
                raise Unavailable(f"{MOST_WAITING} requests are waiting already: try again later")
            self._waiting.append(job)
            self._change.notify()

    def cancel(self, job: Job) -> None:
        """Its client has gone: drop the job, in the middle of an evaluation if need be. Does nothing once it ended."""
        with self._change:
            if not job.outcome:
                job.outcome = "cancelled"
                if job is self._current:
                    self.model.engine.interrupt(_Cancelled())

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread lives."""
        return self._thread.is_alive()

    @property
    def accepting(self) -> bool:
        """Whether new jobs are taken."""
        return self.healthy and not self._refusing

    def refuse(self) -> None:
        """From here on take no new jobs, and fail those that wait; those that run go on."""
        with self._change:
            self._refusing = True
            waiting, self._waiting = list(self._waiting), deque()
        for job in waiting:
            self._end(job, Unavailable("the server is shutting down"))

    def stop_running(self) -> None:
        """Fail all jobs and let the thread end."""
        self.refuse()
        with self._change:
            self._closing = True
            if self._current:
                self.model.engine.interrupt(Unavailable("the server is shutting down"))
            self._change.notify()

    def close(self) -> None:
        """Fail all jobs and end the thread; the model stays open."""
        self.stop_running()
        self._thread.join()

    def _loop(self) -> None:
        while job := self._next():
            self._turn(job)
        for job in list(self._running):
            self._end(job, Unavailable("the server is shutting down"))

    def _next(self) -> Job | None:
        """The job whose turn it is, made current; None when closing."""
        with self._change:
            while True:
                if self._closing:
                    return None
                while self._free and self._waiting:
                    self._admit(self._waiting.popleft())
                if self._running:
                    self._running.rotate(-1)
                    self._current = self._running[-1]
                    return self._current
                self._change.wait()

    def _admit(self, job: Job) -> None:
        """Give a job the free sequence that holds most of its prompt, else the one that was free for longest."""
        engine, held = self.model.engine, self.model.held
        sequence = max(self._free, key=lambda s: held[s].common(job.prompt, engine.n_ubatch, Reuse.EXACT))
        self._free.remove(sequence)
        job.started = time.perf_counter()
        self._running.append(job)
        if job.embed:
            job.generation = Embedding(self.model, job.prompt, sequence=sequence)
            return
        job.generation = self.model.start(
            job.prompt,
            sequence=sequence,
            max_tokens=job.max_tokens,
            sampling=job.sampling,
            reuse=Reuse.EXACT,
            rules=job.rules,
            logprobs=job.logprobs,
        )

    def _turn(self, job: Job) -> None:
        """One step of a job."""
        generation, error = job.generation, None
        assert generation
        before = self._counters()
        try:
            token = None if job.outcome else generation.step()
            job.made, job.reused = len(generation.made), generation.reused
            self._count(job, before)
            if token:
                job.first_token = job.first_token or time.perf_counter()
                if not job.listener.token(token):
                    generation.finished = "stop"
        except _Cancelled:
            pass
        except BaseException as failure:  # whatever it is, the other requests go on
            error = failure
        with self._change:
            self._current = None
        if error or job.outcome or generation.finished:
            self._end(job, error)

    def _end(self, job: Job, error: BaseException | None) -> None:
        """Give the sequence back and tell the listener."""
        with self._change:
            if generation := job.generation:
                self._running.remove(job)
                self._free.append(generation.sequence)
                generation.close()
            cancelled = job.outcome == "cancelled"
            if not cancelled:
                job.outcome = "failed" if error else (generation and generation.finished) or "failed"
        job.ended = time.perf_counter()
        self.on_end(job)
        with suppress(RuntimeError):  # the listener's event loop may have ended
            if cancelled:
                return
            if error:
                job.listener.failed(error)
            else:
                job.listener.done(job)

    def _counters(self) -> tuple[float, ...]:
        phases = self.model.cache.stats.values()
        return (
            sum(s.hits for s in phases),
            sum(s.late_hits for s in phases),
            sum(s.misses for s in phases),
            sum(s.bytes + s.prefetch_bytes for s in phases),
            sum(s.stall_seconds for s in phases),
        )

    def _count(self, job: Job, before: tuple[float, ...]) -> None:
        hits, late, misses, read, stalled = (
            now - then for now, then in zip(self._counters(), before, strict=True)
        )
        use = job.use
        job.use = Use(
            use.hits + int(hits),
            use.late_hits + int(late),
            use.misses + int(misses),
            use.bytes + int(read),
            use.stall_seconds + stalled,
        )
