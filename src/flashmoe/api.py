"""The Python API: `flashmoe.load` gives a Model that generates text under a memory budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from flashmoe import budget
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.policies import create
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.pool import SlotPool
from flashmoe.cache.residency import make_residency
from flashmoe.embedding import choose_pooling
from flashmoe.engines.llamacpp.engine import LlamaEngine
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.loader import LoadedModel
from flashmoe.engines.llamacpp.token_table import MOST_BYTES
from flashmoe.errors import UsageError
from flashmoe.hub import default_policy, resolve
from flashmoe.layout import AUTO, PACKED, PLAIN, REPACKED, check_layout, choose_layout
from flashmoe.model import Model, Progress
from flashmoe.prefetch import Predictor
from flashmoe.prefetch import create_all as create_predictors
from flashmoe.prefetch.scheduler import Prefetcher
from flashmoe.probe import proven_library
from flashmoe.session import Session
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.disk import tune
from flashmoe.storage.gguf import read_gguf
from flashmoe.storage.pack import find_pack
from flashmoe.storage.reader import ExpertReader
from flashmoe.storage.sums import FirstReads, needed_sums
from flashmoe.units import parse_bytes

DEFAULT_UBATCH = 512  # llama.cpp's own
SMALL_UBATCH = 64  # prompts are still read fast
MOST_FOR_PREDICTING = 0.02  # of the budget: slots are worth more
MOST_FOR_BUFFERS = 0.05  # of the pool's memory, where the micro-batch is larger


def load(
    model: str | Path,
    *,
    ram: str | int | None = None,
    cache: str | None = None,
    policy: str | None = None,
    prefetch: str = "auto",
    layout: str = AUTO,
    n_ctx: int | None = None,
    n_ubatch: int = DEFAULT_UBATCH,
    threads: int | None = None,
    all_logits: bool = False,
    trace: bool = False,
    sequences: int = 1,
    pooling: str = "none",
    save_cache: bool | str | Path = False,
    verify: bool = False,
    progress: Progress | None = None,
    library: Library | None = None,
) -> Model:
    """Load a GGUF MoE model whose experts stay on the SSD.

    model: path of a GGUF (or of the first file of a split set), "demo", or "hf:organisation/repository[:file]".
    ram: memory for the whole process, for example "6GiB"; by default a share of what is available.
    cache: sizes the expert pool directly instead: "25%" of the experts, "2GiB", or a number of slots ("300").
    policy: eviction policy, NAME or NAME:FILE (default: lfu-aged, or what is bundled with the demo model).
    prefetch: predictor of the next layer's experts: "gate", "table", "promoe:FILE", "moe-infinity", "none", or "auto":
        the first of gate and table that is worth asking on this text, and none where neither is.
    layout: of all weights. "plain": the file's; "repacked": those that llama.cpp's default chooses for this processor;
        "auto": repacked where that is faster. The results are llama.cpp's with the same layouts.
    n_ctx: context in tokens (default: the model's, at most 4096, and less, down to 1024, where it would take more than
        a sixth of what the weights leave of the budget: slots are worth more).
    n_ubatch: tokens evaluated at once while a prompt is read; the results are llama.cpp's at the same value.
    threads: compute threads (default: physical cores). all_logits: keep the logits of every token, not the last only.
    trace: record which experts every token is routed to, see `Model.recorder`.
    sequences: prompts that can be continued in turns (see `Model.start`); each has a context of `n_ctx` tokens.
    pooling: how `Model.embed` makes one vector of a text's tokens: "last", "mean", "cls", or "auto": as the file says.
        It costs memory: every token of a micro-batch then has logits. "none": no embeddings.
    save_cache: keep which experts are resident, and what the policy and the predictors have learned, when the model is
        closed, and go on from there at the next start: in the user's cache folder, or in a file. Off by default: with
        `table` the file holds the ids of tokens that were used.
    verify: compare every slice of an expert with its checksum (`flashmoe.verify`) when it is first read; one that
        differs is a ReadError.
    library: a llama.cpp library to use unproven (default: the one that is found, proven once by `flashmoe.probe`).

    Raises ModelError, BudgetError, PolicyError, LibraryError and UsageError, each saying what to do.
    """
    started = time.perf_counter()
    report_progress = progress or (lambda *_: None)
    if ram is not None and cache is not None:
        raise UsageError("give either a budget (ram) or a pool size (cache), not both")
    if n_ubatch < 1 or (threads is not None and threads < 1) or (n_ctx is not None and n_ctx < 1):
        raise UsageError("context, micro-batch and threads must be at least 1")
    check_layout(layout)
    evict = create(policy or default_policy(model))
    predictors = create_predictors(prefetch)
    catalog = ExpertCatalog.from_gguf(read_gguf(resolve(model)))
    evict.check_model(catalog.identity)
    pooling = choose_pooling(pooling, catalog.gguf)
    trained = catalog.gguf.arch_int("context_length", budget.DEFAULT_CONTEXT)
    if n_ctx is not None and n_ctx > trained:
        raise UsageError(
            f"a context of {n_ctx} tokens is more than this model was trained for ({trained}); lower -c"
        )
    with ExitStack() as stack:
        pack = find_pack(catalog) if layout != PLAIN else None
        sums = needed_sums(catalog, pack.sums(catalog) if pack else {}) if verify else None
        reader = ExpertReader([*catalog.gguf.files, pack.path] if pack else catalog.gguf.files)
        stack.callback(reader.close)
        tune(reader, catalog.read_bytes)
        align = max(file.align for file in reader.files)
        limit = 0 if cache is not None else parse_bytes(ram) if ram is not None else budget.default_ram()
        if limit:
            budget.check_before_loading(catalog, limit, align)
        layout = choose_layout(
            layout, catalog, budget.expected_share(catalog, limit, cache, align), pack is not None
        )
        lib = library or proven_library()
        dense = catalog.dense_bytes
        loaded = LoadedModel(
            lib,
            catalog,
            reader.files[: len(catalog.gguf.files)],
            lambda n: report_progress("load", min(n, dense), dense),
            repack=layout == REPACKED,
        )
        stack.callback(loaded.close)
        catalog = pack.apply(loaded.catalog, reader.files) if pack else loaded.catalog
        if sums:
            reader.check(FirstReads(catalog, [file.path for file in reader.files], sums))
        aside = reader.set_aside(catalog.largest_placed) if catalog.largest_placed else 0
        _compile(evict, catalog, ranking=bool(save_cache))
        predictors = _bind(predictors, catalog, limit if prefetch == "auto" else 0)
        budget.release_code()
        make = partial(
            LlamaEngine,
            lib,
            loaded,
            threads=threads or psutil.cpu_count(logical=False) or 1,
            all_logits=all_logits,
            sequences=sequences,
            pooling=pooling,
        )
        context = n_ctx or min(trained, budget.DEFAULT_CONTEXT)
        if limit and n_ctx is None:
            context = _default_context(make, context, limit)
        make = partial(make, n_ctx=context)
        step = min(n_ubatch, context)
        if limit:
            promised = aside + sum(p.nbytes for p in predictors) + (MOST_BYTES if loaded.token_table else 0)
            engine, slots = _fit(make, catalog, step, limit, align, promised)
        else:
            engine, slots = make(n_ubatch=step), budget.parse_cache(str(cache), catalog, align)
        stack.callback(engine.close)
        pool = SlotPool(catalog, slots, reader)
        stack.callback(pool.close)
        spare = budget.spare_slots(catalog, slots) if predictors else [0] * len(slots)
        evict.bind(budget.residency_for(catalog, slots, spare))
        experts = ExpertCache(pool, reader, evict, spare)
        engine.attach(pool, slots, experts)
        left = [n - away for n, away in zip(slots, spare, strict=True)]
        engine.n_ubatch = budget.micro_batch(catalog, left, engine.n_ubatch)
        prefetcher = None
        if predictors and any(spare):
            prefetcher = Prefetcher(predictors, experts)
            engine.prefetch(prefetcher)
        resources = ExitStack()
        ranked = None
        if save_cache:
            session = Session(save_cache, catalog, evict, predictors)
            resources.callback(session.save)  # when all else has been freed
            ranked = session.restore()
        pool.prefault()
        if ranked is not None:
            stack.callback(experts.close)
            experts.warm_start(ranked)
        resources.enter_context(stack.pop_all())
        loaded_model = Model(
            engine,
            experts,
            catalog,
            limit,
            report_progress,
            resources,
            prefetcher=prefetcher,
            layout=PACKED if pack else layout,
        )
        if trace:
            loaded_model.record()
        loaded_model.telemetry.load_seconds = time.perf_counter() - started
        return loaded_model


def _default_context(make: Callable[..., LlamaEngine], wished: int, limit: int) -> int:
    """`budget.default_context`, told from a small one: a large one would be touched at once, beyond the budget."""
    if wished <= budget.SMALL_CONTEXT:
        return wished
    left = limit - budget.status_bytes("VmRSS") - budget.RESERVE
    engine, taken, _ = _measured(partial(make, n_ctx=budget.SMALL_CONTEXT, n_ubatch=1))
    engine.close()
    return budget.default_context(wished, taken, left)


def _measured(make: Callable[[], LlamaEngine]) -> tuple[LlamaEngine, int, int]:
    """An engine, the bytes that its context (KV cache, compute buffers) takes, and how many of them not yet."""
    data, anonymous = budget.status_bytes("VmData"), budget.status_bytes("RssAnon")
    engine = make()
    taken = budget.status_bytes("VmData") - data
    touched = budget.status_bytes("RssAnon") - anonymous
    return engine, taken, max(0, taken - touched) + engine.late_bytes


def _fit(
    make: Callable[..., LlamaEngine], catalog: ExpertCatalog, step: int, limit: int, align: int, promised: int
) -> tuple[LlamaEngine, list[int]]:
    """The engine with the largest micro-batch up to `step` that leaves room for a pool, and that pool's slots.

    Compute buffers grow with the micro-batch: in a tight budget slots are worth more, and a small pool does not allow
    a large micro-batch anyway. `promised`: bytes that others have reserved and not touched. Raises BudgetError.
    """
    hoped = max(limit - budget.status_bytes("VmRSS") - budget.RESERVE, budget.least_pool(catalog, align))
    step = budget.micro_batch(catalog, budget.slots_for(catalog, hoped, align), step)
    while True:
        engine, _, to_come = _measured(partial(make, n_ubatch=step))
        used = budget.status_bytes("VmRSS") + to_come + promised + budget.RESERVE
        # nor can less be kept than starting has taken already
        least = max(used + budget.least_pool(catalog, align), budget.status_bytes("VmHWM"))
        greedy = step > SMALL_UBATCH and to_come > MOST_FOR_BUFFERS * (limit - used)
        if least <= limit and not greedy:
            return engine, budget.slots_for(catalog, limit - used, align)
        engine.close()
        if step == 1:
            raise budget.too_small(limit, least)
        step //= 2


def _bind(predictors: Sequence[Predictor], catalog: ExpertCatalog, limit: int) -> list[Predictor]:
    """The predictors, compiled and fitted to the model; under a limit only those that take little of it.

    Raises PredictorError.
    """
    most = MOST_FOR_PREDICTING * limit if limit else float("inf")
    for predictor in predictors:
        predictor.check_model(catalog.identity)
        if limit:
            predictor.restrict(int(most))
        predictor.bind(len(catalog.layers), catalog.n_experts, catalog.top_k)
    return [p for p in predictors if p.nbytes <= most]


def _compile(policy: EvictionPolicy, catalog: ExpertCatalog, *, ranking: bool) -> None:
    """Let numba compile the policy's kernels before memory is counted and before the first token waits for it."""
    n = catalog.n_experts
    policy.bind(make_residency(len(catalog.layers), n, np.ones(len(catalog.layers), np.int32)))
    ids, out = np.zeros(1, np.int32), np.zeros((3, 1), np.int32)
    policy.begin_sequence()
    policy.access(0, ids, out[0], out[1], out[2])
    policy.access_each(0, ids[np.newaxis], out[0], out[1], out[2])
    policy.window(1, 1)
    if ranking:
        policy.ranking()
    policy.release(0, 0)
