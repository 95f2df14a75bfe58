"""Adaptive: shadow caches of several policies run along, and the best of the recent past drives the real one.

Members: lru, lfu-aged, online, and flashmoe+ where a trained file is given. Each has a shadow ("ghost") cache per
layer, of the layer's share, that holds no bytes and sees the same requests. Hits fade over a window of about
500 steps; per layer, the member with most of them chooses the victims, and another takes over once it is
ahead by a margin. The first to choose is flashmoe+, or lfu-aged without a file: what is learnt while the model runs
must lead before it counts, and a trained policy that does worse than LRU on a user's text is left within some hundred
tokens.

In a layer's first START steps the pool stays near lfu-aged, whoever drives, until it has been better. The shadow cache
of lfu-aged says how many hits that policy would have had so far, and which experts it would hold that the pool does
not: each of those costs one miss at most. While the hits that the pool is ahead by, less those experts, are below -DEBT
of all requests, lfu-aged chooses. Later on the account would be wrong: slots that are lent to prompts count against the
pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.kernels import entries as loops
from flashmoe.cache.kernels.slots import allocating, lean
from flashmoe.cache.policies import flashmoe_plus as plus
from flashmoe.cache.policies import online
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.policies.flashmoe_plus import FlashmoePlus, FlashmoePlusState
from flashmoe.cache.policies.learned import PolicyFile
from flashmoe.cache.policies.online import Online, OnlineState
from flashmoe.cache.residency import GLOBAL
from flashmoe.cache.saved import Limits
from flashmoe.errors import PolicyError

MEMBERS = ("lru", "lfu-aged", "online", "flashmoe+")
LRU, AGED, ONLINE, PLUS = 0, 1, 2, 3
AGED_DECAY = 0.97
WINDOW = 500.0  # steps of a layer
MARGIN = 0.003  # lead in hit rate that makes a change
NEIGHBOURS = 0.5  # weight of all layers' hits beside the layer's own
REQUESTS, AHEAD, APART = 0, 1, 2  # in the ledger
START = 300  # steps of a layer, in which the ledger counts
DEBT = 0.002  # share of all requests so far that the pool may have fewer hits of than lfu-aged


class AdaptiveState(NamedTuple):
    """Scores of the members, their shadow caches, and who drives."""

    score: NDArray[np.float64]  # [M, L, E]
    shadow: NDArray[np.uint8]  # [M, L, E] 1 where resident in the shadow cache
    held: NDArray[np.int32]  # [M, L, E] the residents, in any order
    size: NDArray[np.int64]  # [M, L] how many there are
    gain: NDArray[np.float64]  # [M, L] faded hit rate
    total: NDArray[np.float64]  # [M] mean of gain over the layers
    driver: NDArray[np.int64]  # [L]
    apart: NDArray[np.int64]  # [L] experts in the shadow cache of lfu-aged that the pool does not hold
    ledger: NDArray[np.int64]  # [3] requests, hits less those of lfu-aged's shadow caches, sum of `apart`
    online: OnlineState


class AdaptivePlusState(NamedTuple):
    """The same with flashmoe+ as the last member. Of its own, so that the others do not wait for its kernels."""

    score: NDArray[np.float64]
    shadow: NDArray[np.uint8]
    held: NDArray[np.int32]
    size: NDArray[np.int64]
    gain: NDArray[np.float64]
    total: NDArray[np.float64]
    driver: NDArray[np.int64]
    apart: NDArray[np.int64]
    ledger: NDArray[np.int64]
    online: OnlineState
    learned: FlashmoePlusState


@lean
def is_whole(st, res, layer):
    """Whether a layer's share holds all of its experts: there is nothing to choose, and nothing worth learning."""
    return res.quota[layer] >= st.score.shape[2]


@lean
def score_averages(st, res, layer, ids, n):
    """Bring the scores of a layer up to date for lru and lfu-aged."""
    recent, average = st.score[LRU, layer], st.score[AGED, layer]
    for e in range(average.shape[0]):
        average[e] *= AGED_DECAY
    for i in range(n):
        average[ids[i]] += 1.0
        recent[ids[i]] = res.step[0]


@lean
def score_online(st, layer, ids, n):
    """The same for online."""
    online.follow(st.online, layer, ids, n)
    score, learnt = st.online.score[layer], st.score[ONLINE, layer]
    for e in range(score.shape[0]):
        learnt[e] = score[e]


@lean
def all_hit(st, res, layer, ids, n):
    """Whether nothing is to leave the layer, neither in the pool nor in the shadow cache of flashmoe+."""
    misses = 0
    for i in range(n):
        misses += res.slot_of[layer, ids[i]] < 0 or st.shadow[PLUS, layer, ids[i]] == 0
    return misses == 0


@allocating
def score_plus(st, res, layer, ids, n):
    """The same for flashmoe+: of what either cache holds, and of what is requested; where one is to leave."""
    now = res.accesses[layer]
    plus.note(st.learned, layer, ids, n, now)
    if res.partition[0] != GLOBAL and all_hit(st, res, layer, ids, n):
        return
    hidden = np.empty(st.learned.b1.shape[1], np.float32)
    x = np.empty(st.learned.v1.shape[1], np.float32)
    y, z = np.empty(st.learned.v1.shape[2], np.float32), np.empty(st.learned.mean.shape[0], np.float32)
    plus.read_context(st.learned, layer, hidden)
    for e in range(st.score.shape[2]):
        if res.slot_of[layer, e] >= 0 or st.shadow[PLUS, layer, e] == 1 or res.seen[e] == res.step[0]:
            st.score[PLUS, layer, e] = plus.rate(st.learned, layer, e, hidden, x, y, z, now)


@lean
def serve_shadow(st, res, m, layer, ids, n):
    """Serve the requests from a member's shadow cache; hits."""
    score, shadow, held = st.score[m, layer], st.shadow[m, layer], st.held[m, layer]
    size, step = st.size[m, layer], res.step[0]
    hits = 0
    for i in range(n):
        if shadow[ids[i]] == 1:
            hits += 1
        else:
            shadow[ids[i]] = 1
            held[size] = ids[i]
            size += 1
    while size > res.quota[layer]:
        out = -1
        worst = np.inf
        for i in range(size):
            e = held[i]
            if res.seen[e] != step and (score[e] < worst or (score[e] == worst and e < held[out])):
                worst = score[e]
                out = i
        if out < 0:
            break  # a micro-batch larger than the share
        size -= 1
        shadow[held[out]] = 0
        held[out] = held[size]
    st.size[m, layer] = size
    return hits


@lean
def keep_account(st, res, layer, ids, n):
    """Count the pool's hits, and what it lacks of lfu-aged's shadow cache; before the members serve the requests."""
    apart = 0
    for i in range(st.size[AGED, layer]):
        apart += res.slot_of[layer, st.held[AGED, layer, i]] < 0
    st.ledger[APART] += apart - st.apart[layer]
    st.apart[layer] = apart
    st.ledger[REQUESTS] += n
    for i in range(n):
        st.ledger[AHEAD] += res.slot_of[layer, ids[i]] >= 0


@lean
def may_differ(st, res, layer):
    """Whether a layer may choose other victims than lfu-aged would: an expert that lfu-aged had kept is a miss at most
    once, so that `ledger` says how far behind the pool can come."""
    return res.accesses[layer] > START or st.ledger[AHEAD] - st.ledger[APART] >= -DEBT * st.ledger[REQUESTS]


@lean
def compare(st, res, layer, ids, n):
    """Let all members serve the requests, and choose who drives the layer from here on."""
    n_members, n_layers = st.gain.shape
    keep_account(st, res, layer, ids, n)
    for m in range(n_members):
        hits = serve_shadow(st, res, m, layer, ids, n)
        if m == AGED:
            st.ledger[AHEAD] -= hits
        rate = hits / max(n, 1)
        change = (rate - st.gain[m, layer]) / min(WINDOW, res.accesses[layer] + 1.0)
        st.gain[m, layer] += change
        st.total[m] += change / n_layers
    best = st.driver[layer]
    lead = st.gain[best, layer] + NEIGHBOURS * st.total[best] + MARGIN
    for m in range(n_members):
        value = st.gain[m, layer] + NEIGHBOURS * st.total[m]
        if value > lead:
            lead = value
            best = m
    st.driver[layer] = best


def record(st, res, layer, ids, n):
    score_averages(st, res, layer, ids, n)
    if not is_whole(st, res, layer):
        score_online(st, layer, ids, n)
        compare(st, res, layer, ids, n)


def record_plus(st, res, layer, ids, n):
    score_averages(st, res, layer, ids, n)
    if not is_whole(st, res, layer):
        score_online(st, layer, ids, n)
        score_plus(st, res, layer, ids, n)
        compare(st, res, layer, ids, n)


def victim(st, res, layer, g):
    if layer >= 0:
        member = AGED
        if st.driver[layer] != AGED and may_differ(st, res, layer):
            member = st.driver[layer]
            st.apart[layer] += 1  # at most; the layer's next request counts
            st.ledger[APART] += 1
        return loops.lowest(st.score[member], res, layer, g)
    best = AGED
    for m in range(st.total.shape[0]):
        if st.total[m] > st.total[best] + MARGIN:
            best = m
    return loops.lowest(st.score[best], res, layer, g)


class Adaptive(EvictionPolicy):
    """The best of lru, lfu-aged, online and, with a file, flashmoe+, by shadow caches."""

    name = "adaptive"
    suggested = True
    learns = True
    kernels = loops.compiled(AdaptiveState, record, victim)
    _kernels_plus = loops.compiled(AdaptivePlusState, record_plus, victim)

    fixed = frozenset({"online", "learned"})

    def __init__(self, file: str | Path | None = None, trained: PolicyFile | None = None) -> None:
        super().__init__()
        self.online = Online()
        self.learned = FlashmoePlus(file, trained) if file is not None or trained is not None else None
        if self.learned is not None:
            self.kernels = self._kernels_plus  # type: ignore[misc]  # of this policy alone

    def check_model(self, model: Any) -> None:
        if self.learned is not None:
            self.learned.check_model(model)

    def make_state(self, n_layers: int, n_experts: int) -> AdaptiveState | AdaptivePlusState:
        learned = self.learned
        m = len(MEMBERS) - (learned is None)
        shape = (m, n_layers, n_experts)
        state = AdaptiveState(
            score=np.zeros(shape),
            shadow=np.zeros(shape, np.uint8),
            held=np.zeros(shape, np.int32),
            size=np.zeros(shape[:2], np.int64),
            gain=np.zeros(shape[:2]),
            total=np.zeros(m),
            driver=np.full(n_layers, AGED if learned is None else PLUS, np.int64),
            apart=np.zeros(n_layers, np.int64),
            ledger=np.zeros(3, np.int64),
            online=self.online.make_state(n_layers, n_experts),
        )
        if learned is None:
            return state
        return AdaptivePlusState(*state, learned=learned.make_state(n_layers, n_experts))

    def drivers(self) -> dict[str, int]:
        """How many layers each member drives."""
        counts = np.bincount(self._state.driver, minlength=len(self._state.total))
        return {name: int(count) for name, count in zip(MEMBERS, counts, strict=False)}

    def state(self) -> dict[str, NDArray[Any]]:
        arrays = super().state()
        for name, member in self._members().items():
            arrays |= {f"{name}.{array}": value for array, value in member.state().items()}
        return arrays

    def load_state(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        before = self.state()
        try:
            super().load_state(arrays)
            if not self._consistent():
                raise PolicyError(f"saved state does not fit policy {self.name!r} (held)")
            for name, member in self._members().items():
                own = f"{name}."
                member.load_state({n.removeprefix(own): v for n, v in arrays.items() if n.startswith(own)})
        except PolicyError:
            self.load_state(before)
            raise

    def learnt(self) -> dict[str, NDArray[Any]]:
        self._members()
        return self.online.learnt()

    def recall(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.online.recall(arrays)

    def limits(self) -> dict[str, Limits]:
        n_experts = self.residency.n_experts
        return {
            "driver": (0, len(self._state.total) - 1),
            "shadow": (0, 1),
            "held": (0, n_experts - 1),
            "size": (0, n_experts),
        }

    def _for_victims(self) -> AdaptiveState | AdaptivePlusState:
        state: AdaptiveState | AdaptivePlusState = self._state
        return state._replace(online=online.without_weights(state.online))

    def _consistent(self) -> bool:
        """Whether the lists of what shadow caches hold are what `shadow` says."""
        state = self._state
        listed = np.zeros_like(state.shadow)
        places = np.arange(listed.shape[2]) < state.size[..., None]
        m, layer, _ = np.nonzero(places)
        np.add.at(listed, (m, layer, state.held[places]), 1)
        return bool((listed == state.shadow).all())

    def _members(self) -> dict[str, EvictionPolicy]:
        """The members that have a state of their own, working on this policy's arrays."""
        members: dict[str, EvictionPolicy] = {"online": self.online}
        if self.learned is not None:
            members["learned"] = self.learned
        for name, member in members.items():
            member._res, member._state = self._res, getattr(self._state, name)
        return members
