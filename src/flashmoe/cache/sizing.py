"""How large a pool is: from a share, a size or a number of slots to the slots of each size group and layer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.pool import slot_bytes
from flashmoe.cache.residency import Residency, equal_quota, make_residency
from flashmoe.common.units import format_bytes, parse_bytes
from flashmoe.errors import BudgetError, UsageError
from flashmoe.storage.catalog import ExpertCatalog

# Slots for experts that are prefetched and not yet asked for: a layer's guesses (prefetch.scheduler.MOST), and one
# whose read has to end although it is wanted no more. Every further one would cost more hits than it brings
SPARE = 4
_MOST_SPARE = 0.03  # of the slots
#: Sizes of micro-batches to choose from, in tokens, and llama.cpp's own.
UBATCHES = (64, 128, 256, 512, 1024, 2048, 4096)
USUAL_UBATCH = 512
_LITTLE = 0.05  # of the experts that a decoded token asks for


def micro_batch(catalog: ExpertCatalog, slots: Sequence[int], wished: int, sequences: int = 1) -> int:
    """Tokens that may be evaluated at once: what they pick, any expert of a layer, must fit into the pool.

    Where several sequences are evaluated together, llama.cpp takes one token of one sequence more than a micro-batch
    has; 0 where not even two tokens fit then.
    """
    least = min(slots)
    if least >= catalog.n_experts:
        return wished
    fitting = max(1, least // catalog.top_k)
    if fitting < sequences:
        fitting -= 1
    return min(wished, fitting)


def least_slots(catalog: ExpertCatalog, tokens: int, sequences: int = 1) -> int:
    """Slots of a size group with which `micro_batch` allows `tokens` tokens."""
    return min(catalog.n_experts, (tokens + (tokens < sequences)) * catalog.top_k)


def prompt_reads(catalog: ExpertCatalog, tokens: int) -> float:
    """Distinct experts that a layer of a micro-batch asks for, per token: what a prompt reads with an empty pool.

    With experts picked evenly; real routers ask for fewer.
    """
    n = catalog.n_experts
    return n * (1 - (1 - catalog.top_k / n) ** tokens) / tokens


def default_ubatch(catalog: ExpertCatalog) -> int:
    """Tokens of a micro-batch where its buffers cost no slots: a prompt's token reads little beside a decoded one."""
    few = _LITTLE * catalog.top_k
    return next((n for n in UBATCHES if n >= USUAL_UBATCH and prompt_reads(catalog, n) <= few), UBATCHES[-1])


def best_ubatch(
    catalog: ExpertCatalog, slots_with: Callable[[int], Sequence[int]], candidates: Sequence[int]
) -> int:
    """The candidate with which a token of a prompt and a decoded one read the fewest experts together.

    slots_with: the slots of each size group that a micro-batch of so many tokens leaves; none where it leaves too few.
    """

    def reads(tokens: int) -> float:
        slots = slots_with(tokens)
        if not slots or micro_batch(catalog, slots, tokens) < tokens:
            return float("inf")
        absent = 1 - min(1.0, sum(slots) / catalog.total_experts)
        return absent * (prompt_reads(catalog, tokens) + catalog.top_k)

    return min(candidates, key=lambda tokens: (reads(tokens), abs(math.log2(tokens / USUAL_UBATCH))))


def parse_cache(text: str, catalog: ExpertCatalog, align: int) -> list[int]:
    """Slots of each size group for "25%" (of the experts), a size with a unit, or a number of slots.

    Raises UsageError and BudgetError.
    """
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if share:
        return shares_of(catalog, min(1.0, float(share[1]) / 100))
    if text.strip().isdigit():
        return shares_of(catalog, min(1.0, int(text) / catalog.total_experts))
    try:
        return slots_for(catalog, parse_bytes(text), align)
    except UsageError:
        raise UsageError(
            f"cannot read --cache {text!r}: write a share (25%), a size (2GiB) or slots (300)"
        ) from None


def group_experts(catalog: ExpertCatalog) -> NDArray[np.int64]:
    """Experts of all layers of each size group."""
    return np.bincount(catalog.groups) * catalog.n_experts


def shares_of(catalog: ExpertCatalog, share: float) -> list[int]:
    """The same share of the experts in every size group, never fewer slots than one token needs."""
    members = group_experts(catalog)
    return [int(max(min(catalog.top_k, n), round(share * n))) for n in members]


def slots_for(catalog: ExpertCatalog, pool_bytes: int, align: int) -> list[int]:
    """Slots of each size group that fit into `pool_bytes`. Raises BudgetError when one token's experts do not fit."""
    sizes = slot_bytes(catalog, align)
    members = group_experts(catalog)
    share = min(1.0, pool_bytes / sum(size * int(n) for size, n in zip(sizes, members, strict=True)))
    slots = [max(catalog.top_k, int(share * n)) for n in members]
    if sum(size * n for size, n in zip(sizes, slots, strict=True)) > max(pool_bytes, 0):
        slots = [catalog.top_k] * len(sizes)
        if least_pool(catalog, align) > pool_bytes:
            raise BudgetError(
                f"the expert pool needs at least {format_bytes(least_pool(catalog, align))} "
                f"(one token's {catalog.top_k} experts), {format_bytes(max(pool_bytes, 0))} are left for it"
            )
    return slots


def least_pool(catalog: ExpertCatalog, align: int) -> int:
    """Bytes of the smallest pool that works: one token's experts of one layer in each size group."""
    return sum(size * catalog.top_k for size in slot_bytes(catalog, align))


def spare_slots(catalog: ExpertCatalog, slots: Sequence[int]) -> list[int]:
    """Slots of each size group to set aside for prefetching: enough for a layer's guesses.

    None where all experts of the group fit, or where slots are too few to give any away.
    """
    members = group_experts(catalog)
    return [
        0 if n >= whole else min(SPARE, int(_MOST_SPARE * n))
        for n, whole in zip(slots, members.tolist(), strict=True)
    ]


def shares(slots: int, n_layers: int, n_experts: int, top_k: int) -> NDArray[np.int32]:
    """Slots of each layer, int32 [L], equal in general.

    Shares that do not hold one token's experts would never see a hit: then as many layers as possible get that much,
    and the others borrow in passing.
    """
    if slots >= n_layers * top_k:
        return equal_quota(slots, n_layers, n_experts)
    return np.diff(np.minimum(np.arange(n_layers + 1) * top_k, slots)).astype(np.int32)


def residency_for(
    catalog: ExpertCatalog, slots: Sequence[int], spare: Sequence[int] | None = None
) -> Residency:
    """The arrays of a pool with `slots[g]` slots in size group g, shared equally by the layers of the group.

    `spare[g]` of them are left to prefetching.
    """
    groups = np.array(catalog.groups)
    quota = np.zeros(len(groups), np.int32)
    spare = list(spare or [0] * len(slots))
    for group, (n, away) in enumerate(zip(slots, spare, strict=True)):
        members = np.flatnonzero(groups == group)
        quota[members] = shares(n - away, len(members), catalog.n_experts, catalog.top_k)
    return make_residency(len(groups), catalog.n_experts, quota, groups, spare=spare)
