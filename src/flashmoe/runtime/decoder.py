"""The engine's own loop: evaluates the tokens of one sequence, and counts and records what it does.

Benchmarks, traces, tests, embeddings and the Transformers engine use it; conversations go through llama.cpp's server.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.stats import CacheStats
from flashmoe.common.memory import major_faults
from flashmoe.engines.base import Engine
from flashmoe.errors import ClosedError, UsageError
from flashmoe.prefetch.scheduler import Prefetcher
from flashmoe.routing.recorder import Recorder
from flashmoe.routing.trace import DECODE, PREFILL
from flashmoe.runtime.telemetry import Phase, Telemetry


class Access:
    """Who may evaluate: the process that has loaded the model, one thread at a time, until it is closed.

    `alone` is held while the engine's context is used or handed over; `check` says whether it may be used at all."""

    def __init__(self) -> None:
        # not a SafeLock: an evaluation in the main thread is to be interrupted. CPython runs no signal handler between
        # the acquisition of a lock in C by `with` and the block.
        self.alone = threading.RLock()
        self.closed = False
        self._process = os.getpid()

    @property
    def forked(self) -> bool:
        """Whether this process has a copy of a model of another one: its threads and its drive's queue are not here."""
        return os.getpid() != self._process

    def check(self) -> None:
        """Raises UsageError where nothing may be evaluated any more."""
        if self.forked:
            raise UsageError("this model was loaded before the process was forked: load it in this one")
        if self.closed:
            raise ClosedError


class Decoder:
    """An engine with its expert cache, counters and recorder. One thread at a time has it, see `Access`."""

    def __init__(
        self,
        engine: Engine,
        cache: ExpertCache,
        prefetcher: Prefetcher | None,
        reclaim: Callable[[], None],
    ) -> None:
        """reclaim: called before the engine's context is used, to take it back from whatever else uses it."""
        self.engine, self.cache, self.prefetcher = engine, cache, prefetcher
        self.access = Access()
        self._reclaim = reclaim
        #: Grows whenever what the context holds is forgotten: tokens are evaluated after those of the same turn.
        self.turn = 0
        self.telemetry = Telemetry()
        self.recorder: Recorder | None = None
        self._prompts = -1

    def record(self, recorder: Recorder | None) -> None:
        """Let `recorder` have the routing of every token from here on."""
        self.recorder = recorder
        self.engine.record(recorder)

    def rewind(self) -> None:
        """Another prompt comes: forget the sequence's tokens. Raises UsageError, see `Access`."""
        with self.access.alone:
            self.access.check()
            self._reclaim()
            self.turn += 1
            self.engine.rewind(0)
            self.begin_prompt()

    def begin_prompt(self) -> None:
        """Tell policies and predictors of a new prompt."""
        self.cache.begin_sequence()
        if self.engine.tiers:
            self.engine.tiers.begin_sequence()
        if self.prefetcher:
            self.prefetcher.begin_sequence()
        self._prompts += 1

    def evaluate(self, tokens: Sequence[int], *, decode: bool, embed: bool = False) -> float:
        """Evaluate tokens of a prompt or a text (at most a micro-batch), or with `decode` one that was made.

        Returns the seconds that it took. Raises what the engine's `decode` raises, and UsageError, see `Access`.
        """
        with self.access.alone:
            self.access.check()
            self._reclaim()
            self.cache.phase = "decode" if decode else "prefill"
            faults = major_faults()
            began = time.perf_counter()
            try:
                self.engine.decode(tokens, embed=embed)
            except BaseException:
                self.failed()
                raise
            seconds = time.perf_counter() - began
            self.evaluated(tokens, seconds, major_faults() - faults, decode=decode)
            return seconds

    def evaluated(self, tokens: Sequence[int], seconds: float, faults: int, *, decode: bool) -> None:
        """Count tokens that were evaluated, and end the recorder's step. faults: major page faults meanwhile."""
        phase = self.telemetry.decode if decode else self.telemetry.prefill
        phase.seconds += seconds
        phase.tokens += len(tokens)
        if decode:
            self.telemetry.decode_faults += faults
        if self.recorder is not None:
            self.recorder.end_step(tokens, DECODE if decode else PREFILL, self._prompts)

    def forget_decode(self) -> None:
        """Count decoding anew: what came before was for warming up."""
        self.telemetry.decode, self.telemetry.decode_faults = Phase(), 0
        self.cache.stats["decode"] = CacheStats()

    def failed(self) -> None:
        """Tokens could not be evaluated: forget what was recorded of them."""
        if self.recorder is not None:
            self.recorder.drop_step()

    def logits(self) -> NDArray[np.float32]:
        """Logits of the token evaluated last, float32 [vocabulary]."""
        return self.engine.logits()
