"""Turns predictions into reads that only an otherwise idle drive makes.

When a layer's router has spoken, and while its own reads are under way, the likeliest experts of the next layer that
are not resident are queued. They are read while the engine computes; demand reads go before them (storage.reader),
what the next router contradicts is dropped, and a wrong guess evicts nothing (cache.staging). What is left to decide
is whether a guess is worth a read: its chance must reach `LEAST_CHANCE`, and a chance is what this predictor's guesses
of that confidence have been worth on this very text, not what it says. And whether asking is worth its time: a layer is
asked about only while waiting for what it misses takes longer, and the time is charged against the waits that right
guesses have saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.common.compiled import Pinned, address_of
from flashmoe.prefetch.base import Float32, Int32, Predictor
from flashmoe.prefetch.guessing import (
    KIND,
    LEARNING,
    LOOKS,
    PER_MISS,
    RIGHT,
    SPENT,
    TURN,
    choose,
    guesses,
    note,
    turn,
    wants,
)
from flashmoe.prefetch.prompts import PromptGuesses

_TRIAL = 12  # steps after which a predictor is judged, again and again
_LEAST_RIGHT = 0.05  # right guesses per layer and step that make a predictor worth asking
_SLEEP = 8  # when none is, one step of so many is still looked at, or fewer:
_MOST_OF_TIME = 0.02  # that looking takes then


def compile_kernels() -> None:
    """Let numba compile the scheduler's kernels before memory is counted and before the first token waits for it."""
    state = guesses(np.full((2, 2), -1, np.int32), np.zeros(2, np.int32), 1)
    note(state, 0, np.zeros(1, np.int32))
    wants(state, 0)
    choose(state, 0, 0.0)
    Pinned(KIND, state)
    address_of(turn, TURN)


class CompiledTurn(NamedTuple):
    """`Prefetcher.routed` for compiled callers, see `guessing.turn`."""

    function: int  # its address
    state: int  # its first argument


class Ahead(Protocol):
    """What reads ahead: an ExpertCache."""

    @property
    def policy(self) -> EvictionPolicy:
        """Who is resident."""

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """See `ExpertCache.prefetch`."""

    @property
    def seconds_per_miss(self) -> float:
        """See `ExpertCache.seconds_per_miss`."""


class Prefetcher:
    """Feeds a predictor with the routing and prefetches what it is sure enough of while single tokens are decoded, and
    what the routers say of short prompts.

    Given several predictors (`auto`), it keeps the first that is worth asking on this text, and tries them in turn
    until one is; when none is, it hardly asks any more. Until one has been useful those after it learn as well.
    """

    def __init__(self, predictors: Sequence[Predictor], cache: Ahead) -> None:
        self._predictors, self._cache = list(predictors), cache
        residency = cache.policy.residency
        for predictor in self._predictors:
            predictor.use_residency(residency.slot_of)
        self._layers = residency.n_layers
        self._state = guesses(residency.slot_of, residency.used, len(self._predictors))
        self._pinned = Pinned(KIND, self._state)
        self._turn = CompiledTurn(address_of(turn, TURN), self._pinned.address)
        self._new = False  # a sequence, of which predictors are to be told
        self._compiled = False  # all that is asked and learns in this step
        self._tokens: Int32 = np.zeros(0, np.int32)
        self._prompts = PromptGuesses(self._predictors, residency)
        self._active = 0
        self._learning = self._predictors
        self._start()

    def _start(self) -> None:
        """From here on another predictor is asked, or the same one in another light."""
        state = self._state
        for array in (state.kept, state.asked, state.cost, state.number, state.seconds):
            array[:] = 0
        self._step, self._asleep = 0, False
        self._looked = 0  # steps looked at since it was judged
        self._judged = 0, time.perf_counter()  # the step, and when that was
        self._pause = _SLEEP

    @property
    def predictor(self) -> Predictor:
        """The one that is asked at present."""
        return self._predictors[self._active]

    @property
    def needs_hidden(self) -> bool:
        """Whether a predictor applies the model's routers: `use_routers` is to come before the first prompt."""
        return any(predictor.needs_hidden for predictor in self._predictors)

    def use_routers(self, routers: Sequence[Any]) -> None:
        """The routers of all layers, from an engine that can show them."""
        for predictor in self._predictors:
            predictor.use_routers(routers)

    def begin_sequence(self) -> None:
        """A new prompt or conversation begins; predictors are told with its first step, where they may fail."""
        self._new = True

    def begin_step(self, tokens: Sequence[int]) -> None:
        """Tokens are about to be evaluated: one while decoding, a micro-batch of a prompt."""
        if self._new:
            self._new = False
            for predictor in self._predictors:
                predictor.begin_sequence()
        if len(tokens) > 1:
            self._tokens = np.array(tokens, np.int32)
            return
        state = self._state
        self._step += 1
        if self._looked >= (1 if self._asleep else _TRIAL):
            self._judge()
        looks = not self._asleep or self._step % self._pause == 0
        self._looked += looks
        state.number[LOOKS], state.seconds[PER_MISS] = looks, self._cache.seconds_per_miss
        for predictor in self._learning:
            predictor.begin_step(tokens[0])
        self._enter()
        self._guess(-1)

    def _enter(self) -> None:
        """Write down whom compiled code is to call in this step, if it can."""
        entries, state = [predictor.compiled() for predictor in self._learning], self._state
        self._compiled = None not in entries
        if self._compiled:
            asked = entries[self._learning.index(self.predictor)]
            state.entries[0] = asked.predict, asked.state  # type: ignore[union-attr]
            for i, entry in enumerate(entries):
                state.entries[i + 1] = entry.observe, entry.state  # type: ignore[union-attr]
            state.number[LEARNING] = len(entries)

    @property
    def compiled(self) -> CompiledTurn | None:
        """What compiled code calls instead of `routed` in the present step; `read_ahead` is to follow where it returns
        more than 0."""
        return self._turn if self._compiled else None

    def routed_many(
        self, layer: int, ids: Int32, hidden: Callable[[], Float32 | None] = lambda: None
    ) -> None:
        """The router of a layer has picked `ids`, int32 [tokens, k], for a micro-batch of a prompt.

        hidden: gives its inputs, float32 [tokens, n], where they are known.
        """
        for predictor in self._learning:
            predictor.observe_many(layer, ids, self._tokens[-len(ids) :])
        if experts := self._prompts.next_layer(layer, ids, hidden):
            self._cache.prefetch(layer + 1, experts)

    def routed(self, layer: int, ids: Int32) -> None:
        """The router of a layer has picked `ids`, int32 [k], for the present token."""
        if self._compiled:
            if turn(self._pinned.address, layer, ids.ctypes.data, len(ids), 0) >= 0:
                self.read_ahead(layer)
            return
        for predictor in self._learning:
            predictor.observe(layer, ids)
        note(self._state, layer, ids)
        self._guess(layer)

    def _guess(self, layer: int) -> None:
        """Prefetch for the layer after `layer`, of which the predictor is asked in Python."""
        target = layer + 1
        if wants(self._state, target):
            began = time.perf_counter()
            self.predictor.predict(layer, target, self._state.chances)
            choose(self._state, target, time.perf_counter() - began)
            self.read_ahead(layer)

    def read_ahead(self, layer: int) -> None:
        """Prefetch what has been guessed about the layer after `layer`, if there is one."""
        target = layer + 1
        if target < self._layers:
            worth = self._state.made[target, 1]
            self._cache.prefetch(target, self._state.experts[target, :worth].tolist())

    def _judge(self) -> None:
        now, state = time.perf_counter(), self._state
        right, spent = int(state.number[RIGHT]), float(state.seconds[SPENT])
        allowed = _MOST_OF_TIME * (now - self._judged[1]) / max(1, self._step - self._judged[0])  # of a step
        self._pause = max(_SLEEP, int(spent / max(1, self._looked) / allowed) if allowed else 0)
        useful = right >= _LEAST_RIGHT * self._layers * self._looked
        useful = useful and spent < right * self._cache.seconds_per_miss
        state.number[RIGHT], state.seconds[SPENT] = 0, 0
        self._looked, self._judged = 0, (self._step, now)
        if useful:
            self._asleep = False
            self._learning = [self.predictor]
        elif self._active + 1 < len(self._predictors):
            self._active += 1
            self._learning = self._predictors[self._active :]
            self._start()
        else:
            self._asleep = True
