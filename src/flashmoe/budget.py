"""Memory: what the process may use, what it uses, and how many slots that leaves."""

from __future__ import annotations

import ctypes
import mmap
import re
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from flashmoe.cache.pool import slot_bytes
from flashmoe.cache.residency import Residency, equal_quota, make_residency
from flashmoe.errors import BudgetError, UsageError
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.units import format_bytes, parse_bytes

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
_MADV_PAGEOUT = 21  # Linux 5.4; not in Python's mmap module
DEFAULT_SHARE = 0.7  # of the memory that is available: the machine stays usable
# Not seen when the pool is sized: scratch of the expert products, read buffers, what Python takes while it runs
RESERVE = 32 << 20
# Slots for experts that are prefetched and not yet asked for: a layer's guesses (prefetch.scheduler.MOST), and one
# whose read has to end although it is wanted no more. Every further one would cost more hits than it brings
SPARE = 4
_MOST_SPARE = 0.03  # of the slots
# Interpreter, libraries, compute buffers, as seen with small models: for decisions before loading
_BEFORE_LOADING = 160 << 20


def check_context(n_ctx: int | None, trained: int) -> None:
    """Raise UsageError where a context is larger than the one that the model was `trained` with."""
    if n_ctx is not None and n_ctx > trained:
        raise UsageError(
            f"a context of {n_ctx} tokens is more than this model was trained for ({trained}); lower -c"
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


def release_code() -> None:
    """Take the pages of libraries out of this process's memory; those still in use come back by themselves.

    Compilers and loaders that have done their work leave 80 MiB behind. Does nothing where there is no /proc.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for fields in (line.split(maxsplit=5) for line in lines):
        # code is never changed; read-only data may hold relocated addresses, which only PAGEOUT leaves alone
        advice = {"r-xp": mmap.MADV_DONTNEED, "r--p": _MADV_PAGEOUT}.get(fields[1])
        if advice is not None and len(fields) == 6 and fields[5].startswith("/"):
            start, end = (int(address, 16) for address in fields[0].split("-"))
            madvise(start, end - start, advice)


def memory_limit() -> int:
    """Bytes this process may use at most: the machine's memory, or its cgroup's limit where that is lower."""
    limits = [psutil.virtual_memory().total]
    try:
        entries = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return limits[0]
    for _, controllers, path in entries:
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        folder = root / path.strip("/")
        for place in (folder, *folder.parents):
            if root not in (place, *place.parents):
                break
            try:
                text = (place / name).read_text().strip()
            except OSError:
                continue
            if text.isdigit():
                limits.append(int(text))
    return min(limits)


def default_ram() -> int:
    """The budget where none is given: a share of the memory available to this process."""
    return int(DEFAULT_SHARE * min(psutil.virtual_memory().available, memory_limit()))


def status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes (VmRSS, VmHWM, VmData, RssAnon); 0 where it does not exist."""
    try:
        match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return int(match[1]) << 10 if match else 0


def major_faults() -> int:
    """Pages of this process that had to be read back from disk so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


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


def expected_share(catalog: ExpertCatalog, budget: int, cache: str | None, align: int) -> float:
    """About which share of the experts a budget, or a pool size, will hold. Raises UsageError and BudgetError."""
    if cache is not None:
        slots = parse_cache(cache, catalog, align)
    else:
        pool = max(budget - catalog.dense_bytes - _BEFORE_LOADING, least_pool(catalog, align))
        slots = slots_for(catalog, pool, align)
    return sum(slots) / catalog.total_experts


def least_pool(catalog: ExpertCatalog, align: int) -> int:
    """Bytes of the smallest pool that works: one token's experts of one layer in each size group."""
    return sum(size * catalog.top_k for size in slot_bytes(catalog, align))


def check_before_loading(catalog: ExpertCatalog, budget: int, align: int) -> None:
    """Refuse a budget that cannot work, before minutes are spent on loading. Raises BudgetError.

    This is an estimate; where the dense weights easily fit into the memory at hand, `load` finds the exact minimum.
    """
    least = catalog.dense_bytes + least_pool(catalog, align) + _BEFORE_LOADING
    if budget < least and catalog.dense_bytes > default_ram() // 4:
        raise too_small(budget, least)


def too_small(budget: int, least: int) -> BudgetError:
    """The error for a budget below `least` bytes; it names a budget that works, rounded up."""
    step = 16 << 20
    works = -(-least // step) * step
    return BudgetError(
        f"--ram {format_bytes(budget)} is too small for this model: the smallest that works is {works >> 20}MiB"
    )


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
