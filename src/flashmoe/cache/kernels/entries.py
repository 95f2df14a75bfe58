"""The compiled entry points of an eviction policy, made of its kernels.

A policy is up to four kernels over its own state (a NamedTuple class of arrays) and the pool's `Residency`:

    record(st, res, layer, ids, n)   the distinct experts ids[:n] of a layer are requested; residency is still
                                     as before the access (slot_of >= 0: a hit). Called once per access.
    victim(st, res, layer, g)        slot to evict: of this layer, or with layer < 0 of any layer in size
                                     group g; -1 where `evictable` allows none.
    evicted(st, res, layer, expert)  the expert is about to lose its slot. May be left out.
    begin(st)                        a sequence begins. May be left out.

They return numbers, never raise, and allocate nothing; what must allocate goes into a function of its own, which
`allocating` decorates. `compiled(State, ...)` makes the entry points of a policy of them: the loops find the
kernels by the type of the state they are given, which numba resolves while compiling: no pointers, no Python.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

from flashmoe.cache.kernels import rules
from flashmoe.cache.kernels.loops import access_loop, rank_loop, release_loop, window_loop
from flashmoe.cache.kernels.replay import replay_loop
from flashmoe.cache.kernels.rules import RULES, begin_rule, ignore_begin, ignore_eviction
from flashmoe.cache.kernels.slots import LEAN, allocating, evictable, lean, lowest
from flashmoe.common.compiled import call4, layout, pinned
from flashmoe.common.kept import kept, source

__all__ = ["Kernels", "allocating", "compiled", "evictable", "lean", "lowest"]

REQUEST = "request"  # kind of Pinned: ids, slots_out, miss_expert, miss_slot of EvictionPolicy.access


@kept(**LEAN)
def access_each(access, pool, request, layer, ids, wanted):
    """An access, by its address, for each row of ids, int32 [tokens, k]; wanted: int32 [k], the ids of the request.

    Returns -1 where a row does not fit, else 0. One for all policies: nothing is compiled twice for it.
    """
    for t in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            wanted[j] = ids[t, j]
        if call4(access, pool, request, layer, ids.shape[1]) < 0:
            return -1
    return 0


class Kernels(NamedTuple):
    """The compiled entry points of a policy."""

    access: Any  # (Pinned (state, res), Pinned REQUEST, layer, n); EvictionPolicy.request
    window: Callable[..., None]  # (state, res, tokens, k)
    release: Callable[..., int]  # (state, res, layer, expert) -> slot or -1
    replay: Callable[..., int]  # see replay_loop; -> -1 or failed step
    begin: Callable[..., None]  # (state) -> None
    rank: Callable[..., int]  # (state, res, order) -> how many; empties the pool


def compiled(
    state: type,
    record: Callable[..., Any],
    victim: Callable[..., Any],
    evicted: Callable[..., Any] = ignore_eviction,
    begin: Callable[..., Any] = ignore_begin,
) -> Kernels:
    """The entry points of a policy from its kernels (plain functions with the argument names above).

    They are kept on disk: a second start compiles nothing, and a change of what they are made of compiles afresh. The
    name of the state's class must be its own: numba names compiled code after it.
    """
    for other in RULES:
        if other is not state and other.__name__ == state.__name__:
            raise ValueError(f"{other} has the same name: numba's symbols would clash, choose another")
    RULES[state] = {"record": record, "victim": victim, "evicted": evicted, "begin": begin}
    kind = state.__name__

    def reached():  # by the loops, through the type of the state
        return source(rules), record, victim, evicted, begin

    def addressed():
        return *reached(), layout(kind), layout(REQUEST)

    def access(pool, request, layer, n):
        st, res = pinned(pool, kind)
        ids, slots_out, miss_expert, miss_slot = pinned(request, REQUEST)
        misses = access_loop(st, res, layer, ids[:n], slots_out[:n], miss_expert, miss_slot)
        if misses < 0:
            return -1
        distinct = 0
        for e in range(res.seen.shape[0]):
            distinct += res.seen[e] == res.step[0]
        return (distinct - misses) << 32 | misses

    def start(st):
        begin_rule(st)

    def keep(function, also=reached, **options):
        # a file of its own on disk: what it names must be there to import when it is read again
        function.__qualname__ = f"{state.__module__}.{kind}.{function.__name__}"
        return kept(also=also, **options)(function)

    def entry(loop):
        """A loop, compiled for this state: called from a function of its own, it would be optimised twice."""
        own = FunctionType(loop.__code__, loop.__globals__)
        return keep(own, **LEAN)

    return Kernels(
        keep(access, addressed),
        entry(window_loop),
        entry(release_loop),
        entry(replay_loop),
        keep(start),
        entry(rank_loop),
    )
