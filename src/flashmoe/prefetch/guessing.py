"""The compiled part of the scheduler: what guesses were worth, which are worth a read, and a layer's whole turn."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray, types
from numpy.typing import NDArray

from flashmoe.common.compiled import call4, call5, int32_at, layout, pinned
from flashmoe.common.kept import kept

LEAST_CHANCE = 0.7
MOST = 3  # experts queued per layer: about what a drive reads while a layer computes
GUESSES = 6  # candidates per layer whose fate is watched
BINS = 24
_PRIOR = 12.0  # guesses that the predictor's own word counts for
_FORGET = 400.0  # guesses a bin remembers
_RATE = 0.1  # of the moving averages of a layer's misses, and of what answers about it take:
_DOUBT = 0.02  # as much less is believed of that each time when it was too much

KIND = "Guesses"
TURN = types.int64(*(types.int64,) * 5)  # of `turn`
RIGHT, LOOKS, LEARNING = range(3)  # Guesses.number
SPENT, PER_MISS = range(2)  # Guesses.seconds
_clock: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_MONOTONIC = 1  # CLOCK_MONOTONIC


class Guesses(NamedTuple):
    """L layers of E experts, P predictors."""

    slot_of: NDArray[np.int32]  # [L, E] of the pool: -1 where absent
    used: NDArray[np.int32]  # [L] of the pool: how many of a layer's experts are resident
    absent: NDArray[np.uint8]  # [L, E] when the layer before was done
    known: NDArray[np.uint8]  # [L] whether that is known
    misses: NDArray[np.float64]  # [L] per token, lately
    cost: NDArray[np.float64]  # [L] seconds of an answer about a layer, lately
    chances: NDArray[np.float32]  # [E] the last answer
    experts: NDArray[np.int32]  # [L, GUESSES] candidates, the likeliest first
    bins: NDArray[np.int32]  # [L, GUESSES] and how likely
    made: NDArray[np.int64]  # [L, 2] how many there are, and how many are worth a read
    kept: NDArray[np.float64]  # [BINS] guesses that came true, by chance
    asked: NDArray[np.float64]  # [BINS] all guesses
    #: [3] guesses that were right; whether to ask in this step; predictors that learn
    number: NDArray[np.int64]
    seconds: NDArray[np.float64]  # [2] spent on asking; of waiting for a miss
    entries: NDArray[np.int64]  # [P + 1, 2] functions of predictors and their states: who is asked; who learn
    clock: NDArray[np.int64]  # [4] two struct timespec


def guesses(slot_of: NDArray[np.int32], used: NDArray[np.int32], predictors: int) -> Guesses:
    """Nothing guessed so far. slot_of, used: see Guesses."""
    n_layers, n_experts = slot_of.shape
    return Guesses(
        slot_of=slot_of,
        used=used,
        absent=np.zeros((n_layers, n_experts), np.uint8),
        known=np.zeros(n_layers, np.uint8),
        misses=np.ones(n_layers),
        cost=np.zeros(n_layers),
        chances=np.zeros(n_experts, np.float32),
        experts=np.zeros((n_layers, GUESSES), np.int32),
        bins=np.zeros((n_layers, GUESSES), np.int32),
        made=np.zeros((n_layers, 2), np.int64),
        kept=np.zeros(BINS),
        asked=np.zeros(BINS),
        number=np.zeros(3, np.int64),
        seconds=np.zeros(2),
        entries=np.zeros((predictors + 1, 2), np.int64),
        clock=np.zeros(4, np.int64),
    )


@kept()
def note(st: Any, layer: Any, ids: Any) -> None:
    """Compare what was guessed about a layer with what its router has picked, int32 [k]."""
    if st.known[layer] != 0:
        st.known[layer] = 0
        missed = 0
        for i in range(ids.shape[0]):
            missed += st.absent[layer, ids[i]]
        st.misses[layer] += _RATE * (missed - st.misses[layer])
    found, worth = st.made[layer, 0], st.made[layer, 1]
    st.made[layer] = 0
    for i in range(found):
        place = st.bins[layer, i]
        if st.asked[place] >= _FORGET:
            st.asked[place] *= 0.5
            st.kept[place] *= 0.5
        st.asked[place] += 1
        for j in range(ids.shape[0]):
            if ids[j] == st.experts[layer, i]:
                st.kept[place] += 1
                if i < worth:
                    st.number[RIGHT] += 1
                break


@kept()
def wants(st: Any, target: Any) -> Any:
    """Whether to ask a predictor about a layer."""
    n_layers, n_experts = st.slot_of.shape
    if target == n_layers or st.number[LOOKS] == 0 or st.used[target] == n_experts:
        return False
    for e in range(n_experts):
        st.absent[target, e] = st.slot_of[target, e] < 0
    st.known[target] = 1
    if st.misses[target] * st.seconds[PER_MISS] < st.cost[target]:
        st.cost[target] *= 1 - _DOUBT
        return False  # it would not pay even if all guesses were right
    return True


@kept()
def choose(st: Any, target: Any, seconds: Any) -> Any:
    """An answer about a layer is in `chances`: how many of its likeliest absent experts are worth a read.

    seconds: that the answer took.
    """
    st.seconds[SPENT] += seconds
    st.cost[target] += _RATE * (seconds - st.cost[target])
    found, worth = 0, 0
    while found < GUESSES:
        best, value = -1, np.float32(0)
        for e in range(st.chances.shape[0]):
            if st.chances[e] > value and st.absent[target, e] != 0:
                best, value = e, st.chances[e]
        if best < 0:
            break
        st.chances[best] = 0
        place = min(BINS - 1, int(value * BINS))
        st.experts[target, found], st.bins[target, found] = best, place
        chance = (st.kept[place] + _PRIOR * value) / (st.asked[place] + _PRIOR)
        if worth == found and chance >= LEAST_CHANCE:
            worth += 1
        found += 1
    worth = min(worth, MOST)
    st.made[target, 0], st.made[target, 1] = found, worth
    return worth


def _reached() -> tuple[Any, ...]:
    return (layout(KIND),)


@kept(also=_reached, nogil=True)
def turn(address: Any, layer: Any, ids: Any, n: Any, hidden: Any) -> Any:
    """A layer's router has spoken: predictors learn, and are asked about the next layer.

    address: of pinned Guesses, whose `entries` are set; ids: address of int32 [n]; hidden: address of the router's
    input, 0 where that is not known. Returns how many guesses are worth a read, -1 where nobody was asked.
    """
    st = pinned(address, KIND)
    for i in range(1, st.number[LEARNING] + 1):
        call5(st.entries[i, 0], st.entries[i, 1], layer, ids, n, hidden)
    note(st, layer, carray(int32_at(ids), n))
    target = layer + 1
    if not wants(st, target):
        return -1
    clock = st.clock.ctypes.data
    _clock(_MONOTONIC, clock)
    call4(st.entries[0, 0], st.entries[0, 1], layer, target, st.chances.ctypes.data)
    _clock(_MONOTONIC, clock + 16)
    return choose(st, target, (st.clock[2] - st.clock[0]) + 1e-9 * (st.clock[3] - st.clock[1]))
