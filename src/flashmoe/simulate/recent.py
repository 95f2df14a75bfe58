"""Hit rates of decoding over what a runtime was asked for lately: its own, and what LRU and an oracle would have had.

The runtime's is counted as it runs. The others are replays of the same steps, prompts and their windows among them,
from the experts that were resident when these began: the simulator's loops, in parts, so that the caller can
pause in between.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.policies.lru import Lru
from flashmoe.cache.residency import Residency, make_residency
from flashmoe.routing.recorder import Recorder
from flashmoe.routing.trace import DECODE, PREFILL, RoutingTrace
from flashmoe.simulate.oracle import DecodeOracle

IDS = 1 << 18  # kept in all: 2048 tokens of 16 layers, top-8
BLOCK = 32  # tokens: what is forgotten at once
PIECE = 1 << 13  # ids: what is replayed at once, in a millisecond


@dataclass(frozen=True)
class Comparison:
    """Hit rates of decoding, all over the same requests. A prefetched expert counts as it does without prefetching."""

    tokens: int  # decoded
    seconds: float  # since the first of them
    hit_rate: float
    lru: float
    belady: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Block:
    """Consecutive steps of a runtime."""

    began: float  # time.monotonic()
    resident: NDArray[np.bool_]  # [L, E], before the first step
    trace: RoutingTrace
    hits: int  # of the runtime's policy, while decoding
    requests: int


class RecentSteps:
    """Sees every layer's routing (a RoutingObserver) and keeps the last steps, in blocks."""

    def __init__(self, cache: ExpertCache, top_k: int) -> None:
        self._cache, self._top_k = cache, top_k
        self._kept: deque[Block] = deque()
        self._recorder: Recorder | None = None
        self._phase = DECODE

    def blocks(self) -> list[Block]:
        """Those that are complete, oldest first. From any thread."""
        return list(self._kept)

    def add(self, layer: int, ids: NDArray[Any], _weights: NDArray[Any] | None = None) -> None:
        """See RoutingObserver.

        What several sequences decode together is one request of each layer, which no replay makes: it begins anew.
        """
        if len(ids) > 1 and self._cache.phase == "decode":
            self._kept.clear()
            self._recorder = None
        elif self._recorder is not None:
            self._recorder.add(layer, ids)

    def begin_step(self) -> None:
        if self._recorder is not None:
            self._recorder.end_step(phase=self._phase)
            if len(self._recorder) >= BLOCK:
                self._keep(self._recorder)
                self._recorder = None
        self._phase = DECODE if self._cache.phase == "decode" else PREFILL
        if self._recorder is None:
            residency = self._cache.policy.residency
            self._recorder = Recorder(
                residency.n_layers, self._top_k, residency.n_experts, weights=False, capacity=BLOCK
            )
            self._began, self._resident = time.monotonic(), residency.slot_of >= 0
            self._counted = self._count()

    def _keep(self, recorder: Recorder) -> None:
        hits, requests = (now - then for now, then in zip(self._count(), self._counted, strict=True))
        self._kept.append(Block(self._began, self._resident, recorder.trace(), hits, requests))
        while sum(block.trace.expert_ids.size for block in self._kept) > IDS and len(self._kept) > 1:
            self._kept.popleft()

    def _count(self) -> tuple[int, int]:
        stats = self._cache.stats["decode"]
        return stats.hits - stats.prefetch_hits, stats.requests


def compare(
    blocks: Sequence[Block], quota: NDArray[np.int32], group: NDArray[np.int32] | None = None
) -> Iterator[Comparison | None]:
    """Replay consecutive `blocks` for a pool of `quota` [L] slots a layer, in the size groups `group` [L].

    Yields None after each piece of work (a few milliseconds, in which Python's lock is held), and at last the result.
    """
    ids = np.concatenate([block.trace.expert_ids for block in blocks])
    sizes = np.concatenate([np.diff(block.trace.steps()) for block in blocks])
    decode = np.concatenate([block.trace.phase[block.trace.steps()[:-1]] == DECODE for block in blocks])
    first = np.concatenate([[0], np.cumsum(sizes)])
    resident = blocks[0].resident
    n_layers, n_experts = resident.shape
    oracle = DecodeOracle()
    yield None
    rates = []
    for policy in (Lru(), oracle):
        policy.bind(_holding(make_residency(n_layers, n_experts, quota.copy(), group), resident))
        if policy is oracle:
            oracle.set_future(ids, first, decode)
            yield None
        requests = hits = 0
        for start, end in _pieces(sizes * ids[0].size):
            policy.window(int(sizes[start]), ids.shape[2])  # a replay begins without one
            steps = first[start : end + 1]
            counted = policy.replay(
                ids[steps[0] : steps[-1]], steps - steps[0], np.zeros(end - start, np.uint8)
            )
            requests += int(counted.requests[decode[start:end]].sum())
            hits += int(counted.hits[decode[start:end]].sum())
            yield None
        rates.append(hits / max(1, requests))
    yield Comparison(
        tokens=int(decode.sum()),
        seconds=time.monotonic() - blocks[0].began,
        hit_rate=sum(block.hits for block in blocks) / max(1, sum(block.requests for block in blocks)),
        lru=rates[0],
        belady=rates[1],
    )


def _pieces(sizes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of steps, of about PIECE ids each; sizes: of the steps [N], in ids."""
    ends = np.flatnonzero(np.diff(np.cumsum(sizes) // PIECE)) + 1
    yield from pairwise([0, *ends.tolist(), len(sizes)])


def _holding(res: Residency, resident: NDArray[np.bool_]) -> Residency:
    """An empty pool with the experts that are `resident` [L, E] let in."""
    used = resident.sum(axis=1)
    for group in range(len(res.free_count)):
        own = np.flatnonzero(res.group == group)
        members, experts = np.nonzero(resident[own])
        layers = own[members]
        slots = res.group_start[group] + np.arange(len(layers))  # the stack's top is the lowest slot
        place = np.arange(len(layers)) - np.repeat(np.cumsum(used[own]) - used[own], used[own])
        res.slot_of[layers, experts] = slots
        res.owner[slots] = layers * res.n_experts + experts
        res.members[layers, place] = experts
        res.place[slots] = place
        res.free_count[group] -= len(slots)
    res.used[:] = used
    return res


def compile_replays() -> None:
    """Let numba compile what `compare` needs, or fetch it from disk, before memory is counted and time matters."""
    block = Block(
        0.0, np.zeros((1, 2), np.bool_), RoutingTrace(np.zeros((1, 1, 1), np.int16), num_experts=2), 0, 0
    )
    deque(compare([block], np.ones(1, np.int32)), maxlen=0)
