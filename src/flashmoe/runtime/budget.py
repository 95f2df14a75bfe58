"""How a memory budget is shared: what context and conversations may take of it, and the least that works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flashmoe.cache.sizing import group_top_k, least_pool, parse_cache, slots_for
from flashmoe.common import memory
from flashmoe.common.units import format_bytes
from flashmoe.errors import BudgetError, warn
from flashmoe.storage.catalog import ExpertCatalog

DEFAULT_CONTEXT = 4096  # of a file that does not say what it was trained for
SMALL_CONTEXT = 1024  # still a conversation
AGENT_CONTEXT = 32768  # what coding agents need: their prompts alone have thousands of tokens
_CONTEXT_STEP = 256  # llama.cpp's own
# Of what the weights leave: slots are worth more than a context that few prompts fill
_MOST_FOR_CONTEXT = 1 / 6
_MOST_FOR_AGENTS = 1 / 3
MOST_PARALLEL = 4  # conversations, where their number is not given
_MOST_FOR_CONVERSATIONS = 1 / 16  # that wait in RAM for their next turn, and as much for checkpoints
_MOST_CACHE_RAM, _MOST_CHECKPOINTS = 8192 << 20, 32  # llama.cpp's defaults
# Not seen when the pool is sized: read buffers (storage.direct, storage.disk), what Python takes while it runs
RESERVE = 32 << 20
# Interpreter, libraries, compute buffers, as seen with small models: for decisions before loading
_BEFORE_LOADING = 160 << 20


def check_context(n_ctx: int | None, trained: int) -> None:
    """Warn where a context is larger than the one that the model was `trained` with."""
    if n_ctx is not None and n_ctx > trained:
        warn(
            f"a context of {n_ctx} tokens is more than this model was trained for ({trained}): what lies beyond is "
            "understood badly, or not at all; lower -c"
        )


def default_context(wished: int, small_bytes: int, left: int) -> int:
    """Tokens of context where none were asked for: up to `wished`, fewer where they would take too much of `left`.

    left: bytes for context and slots. small_bytes: what SMALL_CONTEXT tokens take. A sixth of `left` at most, or a
    third where that makes it AGENT_CONTEXT; never below SMALL_CONTEXT, if so many are wished.
    """
    small_bytes = max(small_bytes, 1)
    fitting = int(SMALL_CONTEXT * _MOST_FOR_CONTEXT * left / small_bytes)
    agent = min(wished, AGENT_CONTEXT)
    if agent * small_bytes <= SMALL_CONTEXT * _MOST_FOR_AGENTS * left:
        fitting = max(fitting, agent)
    return min(wished, max(SMALL_CONTEXT, fitting // _CONTEXT_STEP * _CONTEXT_STEP))


def default_parallel(context: int, small_bytes: int, left: int) -> int:
    """Conversations that the server holds at once where nothing was said: as many as have room for a `context` each.

    left, small_bytes: see default_context. A third of `left` at most, if there is more than one.
    """
    each = max(1, context * max(small_bytes, 1) // SMALL_CONTEXT)
    return max(1, min(MOST_PARALLEL, int(_MOST_FOR_AGENTS * left) // each))


@dataclass(frozen=True)
class Conversations:
    """What the server may keep of conversations beside its KV cache: bytes, and checkpoints of each slot."""

    cache_ram: int = 0
    checkpoints: int = 0
    checkpoint_bytes: int = 0  # all of them together

    @property
    def nbytes(self) -> int:
        return self.cache_ram + self.checkpoint_bytes


def conversations(left: int, cache_ram: int | None, checkpoint: int, parallel: int) -> Conversations:
    """The share of `left` bytes, for context and slots, that conversations get.

    cache_ram: bytes for those that no slot holds, where they were asked for. checkpoint: bytes of one, of a memory
    that cannot be cut; 0 where it can.
    """
    share = max(0, int(_MOST_FOR_CONVERSATIONS * left)) >> 20 << 20
    kept = min(_MOST_CACHE_RAM, share) if cache_ram is None else cache_ram
    if not checkpoint:
        return Conversations(kept)
    # one at least: without any, every turn reads the whole conversation again
    count = min(_MOST_CHECKPOINTS, max(1, share // (checkpoint * parallel)))
    return Conversations(kept, count, count * checkpoint * parallel)


@dataclass(frozen=True)
class PoolPlan:
    """The pool that a budget leaves room for."""

    least: int  # bytes: the smallest budget that works
    slots: list[int]  # of each size group; empty where the budget is smaller than that


def plan_pool(
    catalog: ExpertCatalog,
    budget: int,
    used: int,
    align: int,
    least: int = 0,
    scratch: Callable[[list[int]], int] = lambda slots: 0,
) -> PoolPlan:
    """The pool beside what else takes memory under a budget, as loading sizes it and `flashmoe plan` predicts it.

    used: bytes of all else: weights, context, buffers. least: what the process has taken already at some time, which a
    budget cannot undercut. scratch: bytes that the engine takes beside so many slots of each size group.
    """
    smallest = least_pool(catalog, align)
    least = max(used + smallest + scratch(group_top_k(catalog)), least)
    if least > budget:
        return PoolPlan(least, [])
    beside = scratch(slots_for(catalog, budget - used, align))  # fewer slots need no more
    return PoolPlan(least, slots_for(catalog, max(smallest, budget - used - beside), align))


def expected_share(catalog: ExpertCatalog, budget: int, cache: str | None, align: int) -> float:
    """About which share of the experts a budget, or a pool size, will hold. Raises UsageError and BudgetError."""
    if cache is not None:
        slots = parse_cache(cache, catalog, align)
    else:
        pool = max(budget - catalog.dense_bytes - _BEFORE_LOADING, least_pool(catalog, align))
        slots = slots_for(catalog, pool, align)
    return sum(slots) / catalog.total_experts


def check_before_loading(catalog: ExpertCatalog, budget: int, align: int) -> None:
    """Refuse a budget that cannot work, before minutes are spent on loading. Raises BudgetError.

    This is an estimate; where the dense weights easily fit into the memory at hand, `load` finds the exact minimum.
    """
    least = catalog.dense_bytes + least_pool(catalog, align) + _BEFORE_LOADING
    if budget < least and catalog.dense_bytes > memory.default_ram() // 4:
        raise too_small(budget, least)


def too_small(budget: int, least: int) -> BudgetError:
    """The error for a budget below `least` bytes; it names a budget that works, rounded up."""
    step = 16 << 20
    works = -(-least // step) * step
    return BudgetError(
        f"--ram {format_bytes(budget)} is too small for this model: the smallest that works is {works >> 20}MiB"
    )
