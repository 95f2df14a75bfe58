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
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.common.kept import kept
from flashmoe.prefetch.base import Int32, Predictor

LEAST_CHANCE = 0.7
MOST = 3  # experts queued per layer: about what a drive reads while a layer computes
_GUESSES = 6  # candidates per layer whose fate is watched
_BINS = 24
_PRIOR = 12.0  # guesses that the predictor's own word counts for
_FORGET = 400.0  # guesses a bin remembers
_TRIAL = 12  # steps after which a predictor is judged, again and again
_LEAST_RIGHT = 0.05  # right guesses per layer and step that make a predictor worth asking
_SLEEP = 8  # when none is, one step of so many is still looked at, or fewer:
_MOST_OF_TIME = 0.02  # that looking takes then
_RATE = 0.1  # of the moving averages of a layer's misses, and of what answers about it take:
_DOUBT = 0.02  # as much less is believed of that each time when it was too much


@kept(nogil=True)
def choose(
    chances: Any, slot_of: Any, kept: Any, asked: Any, experts: Any, bins: Any
) -> Any:  # pragma: no cover - compiled
    """Fill experts and bins [GUESSES] with the likeliest absent experts; returns how many, and how many are worth it.

    chances: float32 [E] by the predictor; slot_of: int32 [E], -1 where absent; kept, asked: float64 [BINS] guesses that
    came true and all guesses, by chance.
    """
    found, worth = 0, 0
    taken = np.zeros(chances.shape[0], np.uint8)
    while found < experts.shape[0]:
        best, value = -1, np.float32(0)
        for e in range(chances.shape[0]):
            if chances[e] > value and slot_of[e] < 0 and taken[e] == 0:
                best, value = e, chances[e]
        if best < 0:
            break
        taken[best] = 1
        place = min(kept.shape[0] - 1, int(value * kept.shape[0]))
        experts[found], bins[found] = best, place
        if worth == found and (kept[place] + _PRIOR * value) / (asked[place] + _PRIOR) >= LEAST_CHANCE:
            worth += 1
        found += 1
    return found, min(worth, MOST)


@kept(nogil=True)
def learn(
    ids: Any, experts: Any, bins: Any, found: Any, worth: Any, kept: Any, asked: Any
) -> Any:  # pragma: no cover - compiled
    """Compare what was guessed with what the router picked; returns how many of the first `worth` were right."""
    right = 0
    for i in range(found):
        place = bins[i]
        if asked[place] >= _FORGET:
            asked[place] *= 0.5
            kept[place] *= 0.5
        asked[place] += 1
        for j in range(ids.shape[0]):
            if ids[j] == experts[i]:
                kept[place] += 1
                right += i < worth
                break
    return right


def compile_kernels() -> None:
    """Let numba compile the scheduler's kernels before memory is counted and before the first token waits for it."""
    chances, slot_of, seen = np.zeros(2, np.float32), np.zeros(2, np.int32), np.zeros(_BINS)
    guesses, bins = np.zeros((1, _GUESSES), np.int32)[0], np.zeros((1, _GUESSES), np.int32)[0]
    choose(chances, slot_of, seen, seen, guesses, bins)
    learn(slot_of, guesses, bins, 0, 0, seen, seen)


class Ahead(Protocol):
    """What reads ahead: an ExpertCache."""

    @property
    def policy(self) -> EvictionPolicy:
        """Who is resident."""
        ...

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """See `ExpertCache.prefetch`."""
        ...

    @property
    def seconds_per_miss(self) -> float:
        """See `ExpertCache.seconds_per_miss`."""
        ...


class Prefetcher:
    """Feeds a predictor with the routing and prefetches what it is sure enough of while single tokens are decoded.

    Given several predictors (`auto`), it keeps the first that is worth asking on this text, and tries them in turn
    until one is; when none is, it hardly asks any more. Until one has been useful those after it learn as well.
    """

    def __init__(self, predictors: Sequence[Predictor], cache: Ahead) -> None:
        self._predictors, self._cache = list(predictors), cache
        residency = cache.policy.residency
        self._slot_of, self._used, self._n_experts = (
            residency.slot_of,
            residency.used,
            residency.n_experts,
        )
        self._layers = residency.n_layers
        for predictor in self._predictors:
            predictor.use_residency(residency.slot_of)
        self._absent = np.zeros((self._layers, residency.n_experts), bool)  # when the layer before was done
        self._counts = [False] * self._layers  # whether that is known
        self._misses = [1.0] * self._layers  # per token, lately
        self._chances = np.zeros(residency.n_experts, np.float32)
        self._experts = np.zeros((self._layers, _GUESSES), np.int32)
        self._bins = np.zeros((self._layers, _GUESSES), np.int32)
        self._made = [(0, 0)] * self._layers  # guesses for a layer, and those worth a read
        self._tokens: Int32 = np.zeros(0, np.int32)
        self._active = 0
        self._learning = self._predictors
        self._start()

    def _start(self) -> None:
        """From here on another predictor is asked, or the same one in another light."""
        self._kept, self._asked = np.zeros(_BINS), np.zeros(_BINS)
        self._step, self._right, self._asleep = 0, 0, False
        self._looked, self._spent = 0, 0.0  # steps looked at since it was judged, and seconds spent on asking
        self._cost = [0.0] * self._layers  # seconds of an answer about a layer, lately
        self._judged = 0, time.perf_counter()  # the step, and when that was
        self._pause = _SLEEP

    @property
    def predictor(self) -> Predictor:
        """The one that is asked at present."""
        return self._predictors[self._active]

    def use_routers(self, routers: Sequence[Any]) -> None:
        """The routers of all layers, from an engine that can show them."""
        for predictor in self._predictors:
            predictor.use_routers(routers)

    def begin_sequence(self) -> None:
        """A new prompt or conversation begins."""
        for predictor in self._predictors:
            predictor.begin_sequence()

    def begin_step(self, tokens: Sequence[int]) -> None:
        """Tokens are about to be evaluated: one while decoding, a micro-batch of a prompt."""
        if len(tokens) > 1:
            self._tokens = np.array(tokens, np.int32)
            return
        self._step += 1
        if self._looked >= (1 if self._asleep else _TRIAL):
            self._judge()
        self._looked += self._looks
        for predictor in self._learning:
            predictor.begin_step(tokens[0])
        self._guess(-1)

    def routed_many(self, layer: int, ids: Int32) -> None:
        """The router of a layer has picked `ids`, int32 [tokens, k], for a micro-batch of a prompt."""
        for predictor in self._learning:
            predictor.observe_many(layer, ids, self._tokens[-len(ids) :])

    def routed(self, layer: int, ids: Int32) -> None:
        """The router of a layer has picked `ids`, int32 [k], for the present token."""
        for predictor in self._learning:
            predictor.observe(layer, ids)
        if self._counts[layer]:
            self._counts[layer] = False
            missed = int(np.count_nonzero(self._absent[layer][ids]))
            self._misses[layer] += _RATE * (missed - self._misses[layer])
        found, worth = self._made[layer]
        if found:
            self._made[layer] = 0, 0
            self._right += learn(
                ids, self._experts[layer], self._bins[layer], found, worth, self._kept, self._asked
            )
        self._guess(layer)

    @property
    def _looks(self) -> bool:
        """Whether the predictor is asked in the present step."""
        return not self._asleep or self._step % self._pause == 0

    def _guess(self, layer: int) -> None:
        """Prefetch for the layer after `layer`."""
        target = layer + 1
        if target == self._layers or self._used[target] == self._n_experts:
            return
        if not self._looks:
            return
        np.less(self._slot_of[target], 0, out=self._absent[target])
        self._counts[target] = True
        if self._misses[target] * self._cache.seconds_per_miss < self._cost[target]:
            self._cost[target] *= 1 - _DOUBT
            return  # it would not pay even if all guesses were right
        began = time.perf_counter()
        self.predictor.predict(layer, target, self._chances)
        taken = time.perf_counter() - began
        self._spent += taken
        self._cost[target] += _RATE * (taken - self._cost[target])
        experts = self._experts[target]
        found, worth = choose(
            self._chances, self._slot_of[target], self._kept, self._asked, experts, self._bins[target]
        )
        self._made[target] = found, worth
        self._cache.prefetch(target, experts[:worth].tolist())

    def _judge(self) -> None:
        now = time.perf_counter()
        allowed = _MOST_OF_TIME * (now - self._judged[1]) / max(1, self._step - self._judged[0])  # of a step
        self._pause = max(_SLEEP, int(self._spent / max(1, self._looked) / allowed) if allowed else 0)
        useful = self._right >= _LEAST_RIGHT * self._layers * self._looked
        useful = useful and self._spent < self._right * self._cache.seconds_per_miss
        self._right, self._looked, self._spent, self._judged = 0, 0, 0.0, (self._step, now)
        if useful:
            self._asleep = False
            self._learning = [self.predictor]
        elif self._active + 1 < len(self._predictors):
            self._active += 1
            self._learning = self._predictors[self._active :]
            self._start()
        else:
            self._asleep = True
