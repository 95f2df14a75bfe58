"""Adaptive: shadow caches of several policies run along, and the best of the recent past drives the real one.

Members: lru, lfu-aged, online, and flashmoe+ where a trained file is given. Each has a shadow ("ghost") cache per
layer, of the layer's share, that holds no bytes and sees the same requests. Hits fade over a window of about
500 steps; per layer, the member with most of them chooses the victims, and another takes over once it is
ahead by a margin. The first to choose is flashmoe+, or lfu-aged without a file: what is learnt while the model runs
must lead before it counts, and a trained policy that does worse than LRU on a user's text is left within some hundred
tokens.
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
from flashmoe.cache.saved import Limits
from flashmoe.errors import PolicyError

MEMBERS = ("lru", "lfu-aged", "online", "flashmoe+")
LRU, AGED, ONLINE, PLUS = 0, 1, 2, 3
AGED_DECAY = 0.97
WINDOW = 500.0  # steps of a layer
MARGIN = 0.003  # lead in hit rate that makes a change
NEIGHBOURS = 0.5  # weight of all layers' hits beside the layer's own


class AdaptiveState(NamedTuple):
    """Scores of the members, their shadow caches, and who drives."""

    score: NDArray[np.float64]  # [M, L, E]
    shadow: NDArray[np.uint8]  # [M, L, E] 1 where resident in the shadow cache
    size: NDArray[np.int64]  # [M, L]
    gain: NDArray[np.float64]  # [M, L] faded hit rate
    total: NDArray[np.float64]  # [M] mean of gain over the layers
    driver: NDArray[np.int64]  # [L]
    members: NDArray[np.int64]  # [1] M
    average: NDArray[np.float64]  # [L, E] of lfu-aged
    asked: NDArray[np.int64]  # [E] scratch: access that asked for the expert
    online: OnlineState
    learned: FlashmoePlusState  # of flashmoe+, size 0 without


@allocating
def score_members(st, res, layer, ids, n):
    """Bring the scores of a layer up to date for every member."""
    n_experts = st.average.shape[1]
    for e in range(n_experts):
        st.average[layer, e] *= AGED_DECAY
    for i in range(n):
        st.average[layer, ids[i]] += 1.0
        st.score[LRU, layer, ids[i]] = res.step[0]
    for e in range(n_experts):
        st.score[AGED, layer, e] = st.average[layer, e]
    online.follow(st.online, layer, ids, n)
    for e in range(n_experts):
        st.score[ONLINE, layer, e] = st.online.score[layer, e]
    if st.members[0] > PLUS:
        now = res.accesses[layer]
        plus.note(st.learned, layer, ids, n, now)
        hidden = np.empty(st.learned.b1.shape[1], np.float32)
        x = np.empty(st.learned.v1.shape[1], np.float32)
        y = np.empty(st.learned.v1.shape[2], np.float32)
        plus.read_context(st.learned, layer, hidden)
        for e in range(n_experts):
            if res.slot_of[layer, e] >= 0 or st.shadow[PLUS, layer, e] == 1 or st.asked[e] == res.step[0]:
                st.score[PLUS, layer, e] = plus.rate(st.learned, layer, e, hidden, x, y, now)


@lean
def serve_shadow(st, res, m, layer, ids, n):
    """Serve the requests from a member's shadow cache; hits."""
    n_experts = st.average.shape[1]
    hits = 0
    for i in range(n):
        if st.shadow[m, layer, ids[i]] == 1:
            hits += 1
        else:
            st.shadow[m, layer, ids[i]] = 1
            st.size[m, layer] += 1
    while st.size[m, layer] > res.quota[layer]:
        out = -1
        for e in range(n_experts):
            if st.shadow[m, layer, e] == 0 or st.asked[e] == res.step[0]:
                continue
            if out < 0 or st.score[m, layer, e] < st.score[m, layer, out]:
                out = e
        if out < 0:
            break  # a micro-batch larger than the share
        st.shadow[m, layer, out] = 0
        st.size[m, layer] -= 1
    return hits


def record(st, res, layer, ids, n):
    for i in range(n):
        st.asked[ids[i]] = res.step[0]
    score_members(st, res, layer, ids, n)
    n_layers = st.gain.shape[1]
    for m in range(st.members[0]):
        rate = serve_shadow(st, res, m, layer, ids, n) / max(n, 1)
        change = (rate - st.gain[m, layer]) / min(WINDOW, res.accesses[layer] + 1.0)
        st.gain[m, layer] += change
        st.total[m] += change / n_layers
    best = st.driver[layer]
    lead = st.gain[best, layer] + NEIGHBOURS * st.total[best] + MARGIN
    for m in range(st.members[0]):
        value = st.gain[m, layer] + NEIGHBOURS * st.total[m]
        if value > lead:
            lead = value
            best = m
    st.driver[layer] = best


def victim(st, res, layer, g):
    if layer >= 0:
        return loops.lowest(st.score[st.driver[layer]], res, layer, g)
    best = AGED
    for m in range(st.members[0]):
        if st.total[m] > st.total[best] + MARGIN:
            best = m
    return loops.lowest(st.score[best], res, layer, g)


class Adaptive(EvictionPolicy):
    """The best of lru, lfu-aged, online and, from a file of `flashmoe train policy`, flashmoe+."""

    name = "adaptive"
    suggested = True
    kernels = loops.compiled(AdaptiveState, record, victim)

    fixed = frozenset({"members", "online", "learned"})

    def __init__(self, file: str | Path | None = None, trained: PolicyFile | None = None) -> None:
        super().__init__()
        self.online = Online()
        self.learned = FlashmoePlus(file, trained) if file is not None or trained is not None else None

    def check_model(self, model: Any) -> None:
        """See EvictionPolicy."""
        if self.learned is not None:
            self.learned.check_model(model)

    def make_state(self, n_layers: int, n_experts: int) -> AdaptiveState:
        """See EvictionPolicy."""
        m = len(MEMBERS) if self.learned is not None else len(MEMBERS) - 1
        learned = self.learned
        state = plus.empty_state() if learned is None else learned.make_state(n_layers, n_experts)
        shape = (m, n_layers, n_experts)
        return AdaptiveState(
            score=np.zeros(shape),
            shadow=np.zeros(shape, np.uint8),
            size=np.zeros(shape[:2], np.int64),
            gain=np.zeros(shape[:2]),
            total=np.zeros(m),
            driver=np.full(n_layers, AGED if learned is None else PLUS, np.int64),
            members=np.array([m], np.int64),
            average=np.zeros(shape[1:]),
            asked=np.zeros(n_experts, np.int64),
            online=self.online.make_state(n_layers, n_experts),
            learned=state,
        )

    def drivers(self) -> dict[str, int]:
        """How many layers each member drives."""
        counts = np.bincount(self._state.driver, minlength=len(self._state.total))
        return {name: int(count) for name, count in zip(MEMBERS, counts, strict=False)}

    def state(self) -> dict[str, NDArray[Any]]:
        """See EvictionPolicy."""
        arrays = super().state()
        for name, member in self._members().items():
            arrays |= {f"{name}.{array}": value for array, value in member.state().items()}
        return arrays

    def load_state(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """See EvictionPolicy."""
        before = self.state()
        try:
            super().load_state(arrays)
            for name, member in self._members().items():
                own = f"{name}."
                member.load_state({n.removeprefix(own): v for n, v in arrays.items() if n.startswith(own)})
        except PolicyError:
            self.load_state(before)
            raise

    def limits(self) -> dict[str, Limits]:
        """See EvictionPolicy."""
        return {"driver": (0, len(self._state.total) - 1)}

    def _members(self) -> dict[str, EvictionPolicy]:
        """The members that have a state of their own, working on this policy's arrays."""
        members: dict[str, EvictionPolicy] = {"online": self.online}
        if self.learned is not None:
            members["learned"] = self.learned
        for name, member in members.items():
            member._res, member._state = self._res, getattr(self._state, name)
        return members
