"""How large a pool is: from a share, a size or a number of slots to the slots of each size group and layer."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.pool import slot_bytes
from flashmoe.cache.residency import Residency, equal_quota, make_residency
from flashmoe.common.units import format_bytes, parse_bytes
from flashmoe.errors import BudgetError, UsageError
from flashmoe.storage.catalog import ExpertCatalog

# Slots for experts that are prefetched and not yet asked for: a layer's guesses (prefetch.guessing.MOST), and one
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
    if min(slots) >= catalog.n_experts:
        return wished
    fitting = max(1, min(n // k for n, k in zip(slots, group_top_k(catalog), strict=True)))
    if fitting < sequences:
        fitting -= 1
    return min(wished, fitting)


def least_slots(catalog: ExpertCatalog, tokens: int, sequences: int = 1) -> list[int]:
    """Slots of each size group with which `micro_batch` allows `tokens` tokens."""
    together = tokens + (tokens < sequences)
    return [min(catalog.n_experts, together * k) for k in group_top_k(catalog)]


def prompt_reads(catalog: ExpertCatalog, tokens: int) -> float:
    """Distinct experts that a layer of a micro-batch asks for, per token: what a prompt reads with an empty pool.

    The mean of all layers, with experts picked evenly; real routers ask for fewer.
    """
    asked = (
        layer.n_experts * (1 - (1 - layer.top_k / layer.n_experts) ** tokens) for layer in catalog.layers
    )
    return sum(asked) / len(catalog.layers) / tokens


def default_ubatch(catalog: ExpertCatalog) -> int:
    """Tokens of a micro-batch where its buffers cost no slots: a prompt's token reads little beside a decoded one."""
    few = _LITTLE * mean_top_k(catalog)
    return next((n for n in UBATCHES if n >= USUAL_UBATCH and prompt_reads(catalog, n) <= few), UBATCHES[-1])


@dataclass(frozen=True)
class Ubatch:
    """A size of micro-batches, and the experts of each layer that are then read for a token.

    A prompt's: if routers pick evenly. A decoded one's: if the share of hits is the square root of the share of experts
    that are resident, about what recorded routing has (docs/policies.md).
    """

    tokens: int
    slots: int
    prompt_reads_per_token: float
    decode_reads_per_token: float

    @property
    def reads(self) -> float:
        """For a prompt's token and a decoded one."""
        return self.prompt_reads_per_token + self.decode_reads_per_token


def ubatches(
    catalog: ExpertCatalog, context: int, pool_bytes: int, token_bytes: float, align: int
) -> list[Ubatch]:
    """The sizes that a budget leaves room for, the one that reads least in front.

    Compute buffers take the place of slots: pool_bytes are left for these with the smallest micro-batch, and each of a
    larger one's tokens takes token_bytes. context: tokens, the most at once.
    """
    found = []
    for tokens in UBATCHES:
        pool = pool_bytes - int(token_bytes * (tokens - UBATCHES[0]))
        if tokens > context or pool < least_pool(catalog, align):
            break
        slots = slots_for(catalog, pool, align)
        if micro_batch(catalog, slots, tokens) == tokens:
            held = min(1.0, sum(slots) / catalog.total_experts)
            prompt = (1 - held) * prompt_reads(catalog, tokens)
            found.append(Ubatch(tokens, sum(slots), prompt, (1 - math.sqrt(held)) * mean_top_k(catalog)))
    return sorted(found, key=lambda u: (u.reads, abs(math.log2(u.tokens / USUAL_UBATCH))))


def parse_cache(text: str, catalog: ExpertCatalog, align: int) -> list[int]:
    """Slots of each size group for "25%" (of the experts), a size with a unit, or a number of slots.

    Raises UsageError and BudgetError.
    """
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if share:
        return shares_of(catalog, min(1.0, float(share[1]) / 100))
    if re.fullmatch(r"\s*\d{1,18}\s*", text):
        return _split(catalog, int(text))
    try:
        return slots_for(catalog, parse_bytes(text), align)
    except UsageError:
        raise UsageError(
            f"cannot read --cache {text!r}: write a share (25%), a size (2GiB) or slots (300)"
        ) from None


def group_experts(catalog: ExpertCatalog) -> NDArray[np.int64]:
    """Experts of all layers of each size group."""
    return np.bincount(catalog.groups) * catalog.n_experts


def group_top_k(catalog: ExpertCatalog) -> list[int]:
    """Experts that a token is given by the layer of each size group that gives it most."""
    return _group_most(catalog.groups, [layer.top_k for layer in catalog.layers])


def mean_top_k(catalog: ExpertCatalog) -> float:
    """Experts that a token is given by a layer, on average."""
    return statistics.fmean(layer.top_k for layer in catalog.layers)


def split_slots(slots: int, groups: Sequence[int], top_k: Sequence[int], n_experts: int) -> list[int]:
    """The slots of each size group that a pool of `slots` has: the same share of the experts in all.

    groups, top_k: of each layer, [L]. Never fewer than one token's experts of a layer, nor more than there are.
    """
    least = _group_most(groups, top_k)
    order = _growth(least, np.bincount(groups) * n_experts)
    more = np.bincount(order[: max(0, slots - sum(least))], minlength=len(least))
    return [k + n for k, n in zip(least, more.tolist(), strict=True)]


def _group_most(groups: Sequence[int], top_k: Sequence[int]) -> list[int]:
    most = [0] * (max(groups) + 1)
    for group, k in zip(groups, top_k, strict=True):
        most[group] = max(most[group], k)
    return most


def _growth(least: Sequence[int], members: NDArray[np.int64]) -> NDArray[np.int64]:
    """The groups in the order in which they get slots, from `least` of each on, to all their members."""
    shares = [np.arange(k + 1, n + 1) / n for k, n in zip(least, members.tolist(), strict=True)]
    group = np.repeat(np.arange(len(least)), [len(own) for own in shares])
    return group[np.lexsort((group, np.concatenate(shares)))]


def _split(catalog: ExpertCatalog, slots: int) -> list[int]:
    return split_slots(slots, catalog.groups, [layer.top_k for layer in catalog.layers], catalog.n_experts)


def shares_of(catalog: ExpertCatalog, share: float) -> list[int]:
    """The same share of the experts in every size group, never fewer slots than one token needs."""
    return _split(catalog, round(share * int(group_experts(catalog).sum())))


def slots_for(catalog: ExpertCatalog, pool_bytes: int, align: int) -> list[int]:
    """Slots of each size group that fit into `pool_bytes`. Raises BudgetError when one token's experts do not fit."""
    least, sizes = group_top_k(catalog), np.array(slot_bytes(catalog, align))
    taken = int(sizes @ least)
    if taken > pool_bytes:
        raise BudgetError(
            f"the expert pool needs at least {format_bytes(taken)} "
            f"(one token's {catalog.top_k} experts), {format_bytes(max(pool_bytes, 0))} are left for it"
        )
    growth = _growth(least, group_experts(catalog))
    fitting = int(np.searchsorted(np.cumsum(sizes[growth]), pool_bytes - taken, side="right"))
    return _split(catalog, sum(least) + fitting)


def least_pool(catalog: ExpertCatalog, align: int) -> int:
    """Bytes of the smallest pool that works: one token's experts of one layer in each size group."""
    return sum(size * k for size, k in zip(slot_bytes(catalog, align), group_top_k(catalog), strict=True))


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


def quotas(
    slots: Sequence[int], groups: Sequence[int], top_k: Sequence[int], n_experts: int
) -> NDArray[np.int32]:
    """Slots of each layer, int32 [L]: those of a size group are shared equally by its layers."""
    quota = np.zeros(len(groups), np.int32)
    for group, (n, k) in enumerate(zip(slots, _group_most(groups, top_k), strict=True)):
        members = np.flatnonzero(np.array(groups) == group)
        quota[members] = shares(n, len(members), n_experts, k)
    return quota


def residency_for(
    catalog: ExpertCatalog, slots: Sequence[int], spare: Sequence[int] | None = None
) -> Residency:
    """The arrays of a pool with `slots[g]` slots in size group g, shared equally by the layers of the group.

    `spare[g]` of them are left to prefetching.
    """
    spare = list(spare or [0] * len(slots))
    left = [n - away for n, away in zip(slots, spare, strict=True)]
    quota = quotas(left, catalog.groups, [layer.top_k for layer in catalog.layers], catalog.n_experts)
    return make_residency(len(catalog.layers), catalog.n_experts, quota, catalog.groups, spare=spare)
