"""A policy's kernels, called by name: numba finds them by the type of the state while it compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.extending import overload

from flashmoe.cache.kernels.slots import INLINED, LEAN

#: State class -> its kernels by name; `kernels.compiled` fills it.
RULES: dict[type, dict[str, Callable[..., Any]]] = {}


def record_rule(st, res, layer, ids, n):
    raise NotImplementedError


def victim_rule(st, res, layer, g):
    raise NotImplementedError


def evicted_rule(st, res, layer, expert):
    raise NotImplementedError


def begin_rule(st):
    raise NotImplementedError


# what a policy that leaves out one of these two kernels gets
def ignore_eviction(st, res, layer, expert):
    pass


def ignore_begin(st):
    pass


@overload(record_rule, jit_options=INLINED)
def _record(st, res, layer, ids, n):
    return RULES[st.instance_class]["record"]


@overload(victim_rule, jit_options=LEAN)
def _victim(st, res, layer, g):
    return RULES[st.instance_class]["victim"]


@overload(evicted_rule, jit_options=INLINED)
def _evicted(st, res, layer, expert):
    return RULES[st.instance_class]["evicted"]


@overload(begin_rule, jit_options=INLINED)
def _begin(st):
    return RULES[st.instance_class]["begin"]
