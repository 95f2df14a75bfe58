"""Opens a GGUF with llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from flashmoe.cache import sizing
from flashmoe.common import memory
from flashmoe.engines.llamacpp.engine import LlamaEngine
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.loader import LoadedModel
from flashmoe.engines.llamacpp.metadata import told_otherwise
from flashmoe.engines.llamacpp.scratch import touched_bytes
from flashmoe.engines.llamacpp.tested import tested_library
from flashmoe.runtime import budget
from flashmoe.runtime.embedding import choose_pooling
from flashmoe.runtime.layout import PACKED, PLAIN, REPACKED, choose_layout
from flashmoe.runtime.opening import Loading, Opened
from flashmoe.runtime.options import LoadOptions
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.checksums import FirstReads, needed_checksums
from flashmoe.storage.disk import tune
from flashmoe.storage.hub import read_catalog
from flashmoe.storage.pack import find_pack
from flashmoe.storage.reader import ExpertReader

_BESIDE_TENSORS = 64 << 20  # of a context


def open_gguf(loading: Loading, stack: ExitStack, library: Library | None) -> Opened:
    """What is opened is closed by `stack`. Raises ModelError, BudgetError, PolicyError, LibraryError, UsageError."""
    options, limit = loading.options, loading.limit
    catalog = read_catalog(loading.model)
    loading.chosen.check(catalog)
    pooling = choose_pooling(options.pooling, catalog.gguf)
    trained = catalog.gguf.arch_int("context_length", budget.DEFAULT_CONTEXT)
    budget.check_context(options.n_ctx, trained)
    lib = library or tested_library()
    pack = find_pack(catalog) if options.layout != PLAIN and lib.repacks else None
    checksums = needed_checksums(catalog, pack.checksums(catalog) if pack else {}) if options.verify else None
    reader = ExpertReader([*catalog.gguf.files, pack.path] if pack else catalog.gguf.files)
    stack.callback(reader.close)
    tune(reader, catalog.read_bytes)
    align = max(file.align for file in reader.files)
    if limit:
        budget.check_before_loading(catalog, limit, align)
    layout = choose_layout(
        options.layout,
        catalog,
        budget.expected_share(catalog, limit, options.cache, align),
        pack is not None,
        lib.repacks,
    )
    dense = catalog.dense_bytes
    loaded = LoadedModel(
        lib,
        catalog,
        reader,
        lambda n: loading.progress(n, dense),
        repack=layout == REPACKED,
        told=told_otherwise(catalog.gguf, n_ctx=options.n_ctx, embeds=pooling != "none"),
    )
    stack.callback(loaded.close)
    catalog = pack.apply(loaded.catalog, reader.files) if pack else loaded.catalog
    if checksums:
        reader.check(FirstReads(catalog, [file.path for file in reader.files], checksums))
    aside = reader.reserve_bounce_buffers(catalog.largest_placed) if catalog.largest_placed else 0
    promised = aside + loading.chosen.prepare(catalog, limit) + catalog.table_bytes + loading.projector_bytes
    make = partial(
        LlamaEngine,
        lib,
        loaded,
        threads=loading.threads,
        all_logits=options.all_logits,
        pooling=pooling,
        cache_types=options.cache_types,
    )
    wanted = None if limit else sizing.parse_cache(str(options.cache), catalog, align)
    for_pool = sum(n * size for n, size in zip(wanted or (), sizing.slot_bytes(catalog, align), strict=False))
    # a pool of a given size has the rest of the memory beside it
    whole = limit or memory.default_ram() + memory.status_bytes("VmRSS")
    left = whole - memory.status_bytes("VmRSS") - promised - for_pool - budget.RESERVE
    context, sequences = _context(make, options, trained, left)
    # some recurrent memories want as many tokens of each sequence in a micro-batch (an assertion of the library's)
    fit_step = partial(_step, catalog, whole=bool(loaded.recurrent))
    make = partial(make, n_ctx=context)
    if wanted is None:
        step = options.n_ubatch or _best_step(make, catalog, context, whole - promised, align)
        step = min(step, context)
        engine, slots, kept = _fit(make, catalog, fit_step, step, sequences, loading, align, promised)
        stack.callback(engine.close)
    else:
        step = min(options.n_ubatch or sizing.default_ubatch(catalog), context)
        if not fit_step(wanted, step, sequences):
            sequences = 1
        step = fit_step(wanted, step, sequences)
        engine = make(n_ubatch=step, sequences=sequences)
        stack.callback(engine.close)
        slots, kept = (
            wanted,
            budget.conversations(left, options.cache_ram_bytes, engine.checkpoint_bytes(), sequences),
        )
    return Opened(engine, catalog, reader, slots, PACKED if pack else layout, kept)


def _context(
    make: Callable[..., LlamaEngine], options: LoadOptions, trained: int, left: int
) -> tuple[int, int]:
    """Tokens of context of each sequence, and how many sequences.

    Where `left` bytes are to decide, that is told from a small context: a large one would be touched at once.
    """
    small = min(trained, budget.SMALL_CONTEXT)
    given = 1 if options.parallel is None else options.parallel
    if given and (options.n_ctx or trained * given <= small):
        return options.n_ctx or trained, given
    engine, taken, _ = _measured(partial(make, n_ctx=small, n_ubatch=1))
    engine.close()
    taken = taken * budget.SMALL_CONTEXT // small
    context = options.n_ctx or budget.default_context(trained, taken * max(1, given), left)
    return context, given or budget.default_parallel(context, taken, left)


def _best_step(
    make: Callable[..., LlamaEngine], catalog: ExpertCatalog, context: int, limit: int, align: int
) -> int:
    """Tokens of a micro-batch under a budget of `limit` bytes: its compute buffers take the place of slots.

    Buffers grow evenly with the micro-batch: two engines show how much.
    """
    few, many = sizing.UBATCHES[0], min(sizing.USUAL_UBATCH, context)
    if many <= few:
        return context
    taken = []
    for n in (few, many):
        engine, nbytes, _ = _measured(partial(make, n_ubatch=n))
        engine.close()
        taken.append(nbytes)
    left = limit - memory.status_bytes("VmRSS") - budget.RESERVE - taken[0]
    slots = sizing.slots_for(catalog, max(left, sizing.least_pool(catalog, align)), align)
    scratch = [touched_bytes(catalog, slots, n) for n in (few, many)]
    each = max(0, taken[1] + scratch[1] - taken[0] - scratch[0]) / (many - few)
    found = sizing.ubatches(catalog, context, left - scratch[0], each, align)
    return found[0].tokens if found else sizing.USUAL_UBATCH


def _step(
    catalog: ExpertCatalog, slots: list[int], wished: int, sequences: int, *, whole: bool = False
) -> int:
    """`sizing.micro_batch` with a pool of so many slots, some of them kept for prefetching.

    whole: a multiple of `sequences`.
    """
    spare = sizing.spare_slots(catalog, slots)
    left = [n - away for n, away in zip(slots, spare, strict=True)]
    step = sizing.micro_batch(catalog, left, wished, sequences)
    return step // sequences * sequences if whole else step


def _measured(make: Callable[[], LlamaEngine]) -> tuple[LlamaEngine, int, int]:
    """An engine, the bytes that its context (KV cache, compute buffers) takes, and how many of them not yet.

    Beside its tensors the library reserves memory for the largest graph that there could be, gigabytes where there are
    many layers and experts, and touches next to nothing of that.
    """
    data, anonymous = memory.status_bytes("VmData"), memory.status_bytes("RssAnon")
    with ExitStack() as stack:
        engine = make()
        stack.callback(engine.close)
        taken = min(memory.status_bytes("VmData") - data, engine.tensor_bytes + _BESIDE_TENSORS)
        touched = memory.status_bytes("RssAnon") - anonymous
        stack.pop_all()
    return engine, taken, max(0, taken - touched) + engine.late_bytes


def _fit(
    make: Callable[..., LlamaEngine],
    catalog: ExpertCatalog,
    fit_step: Callable[[list[int], int, int], int],
    step: int,
    sequences: int,
    loading: Loading,
    align: int,
    promised: int,
) -> tuple[LlamaEngine, list[int], budget.Conversations]:
    """The engine with the largest micro-batch up to `step` that leaves room for a pool, that pool's slots, and what
    the server may keep of conversations.

    A small pool does not allow a large micro-batch. A pool that is too small for several sequences gets one.
    `promised`: bytes that others have reserved and not touched. Raises BudgetError.
    """
    limit, options = loading.limit, loading.options
    hoped = max(limit - memory.status_bytes("VmRSS") - budget.RESERVE, sizing.least_pool(catalog, align))
    slots, whole_pool = sizing.slots_for(catalog, hoped, align), sizing.group_experts(catalog).tolist()
    if not fit_step(slots, step, sequences):
        sequences = 1
    step = fit_step(slots, step, sequences)
    while True:
        with ExitStack() as attempt:
            engine, _, to_come = _measured(partial(make, n_ubatch=step, sequences=sequences))
            attempt.callback(engine.close)
            used = memory.status_bytes("VmRSS") + to_come + promised + budget.RESERVE
            kept = budget.conversations(
                limit - used, options.cache_ram_bytes, engine.checkpoint_bytes(), sequences
            )
            used += kept.nbytes
            pool = budget.plan_pool(
                catalog,
                limit,
                used,
                align,
                memory.status_bytes("VmHWM"),
                partial(touched_bytes, catalog, n_ubatch=max(step, sequences)),
            )
            allowed = 0
            if pool.slots:
                allowed = fit_step(pool.slots, step, sequences)
                if allowed == step:
                    attempt.pop_all()
                    return engine, pool.slots, kept
        if smaller := allowed or fit_step(whole_pool, step // 2, sequences):
            step = smaller
        elif sequences > 1:
            sequences = 1
        else:
            raise budget.too_small(limit, pool.least)
