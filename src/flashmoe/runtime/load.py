"""The Python API: `flashmoe.load` gives a Model that generates text under a memory budget."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmoe.cache import sizing
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.policies import create
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.pool import SlotPool
from flashmoe.cache.remembered import Remembered
from flashmoe.cache.residency import make_residency
from flashmoe.common import memory, numa
from flashmoe.common.machine import cores
from flashmoe.common.signals import run_apart
from flashmoe.common.units import parse_bytes
from flashmoe.engines.llamacpp import rewriting
from flashmoe.engines.llamacpp.engine import LlamaEngine
from flashmoe.engines.llamacpp.serving.options import ServerOptions, projector_bytes
from flashmoe.errors import FlashMoEError, FlashMoEWarning, UsageError
from flashmoe.prefetch import Predictor, scheduler
from flashmoe.prefetch import create_all as create_predictors
from flashmoe.prefetch.scheduler import Prefetcher
from flashmoe.routing.approximation import parse as parse_approx
from flashmoe.routing.rewrite import Rewriter
from flashmoe.runtime.governor import Governor
from flashmoe.runtime.learning import Learning
from flashmoe.runtime.levels import levels_of
from flashmoe.runtime.model import Model, Progress
from flashmoe.runtime.opening import Loading, Opened
from flashmoe.runtime.options import AUTO_RAM, LLAMACPP, TRANSFORMERS, LoadOptions
from flashmoe.runtime.session import Session
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.hub import default_policy

if TYPE_CHECKING:
    from flashmoe.engines.llamacpp.library import Library
    from flashmoe.engines.llamacpp.serving.saved import SavedConversations

MOST_FOR_PREDICTING = 0.02  # of the budget: slots are worth more


def load(
    model: str | Path,
    *,
    options: LoadOptions | None = None,
    progress: Progress | None = None,
    library: Library | None = None,
    **given: Any,
) -> Model:
    """Load an MoE model whose experts stay on the SSD.

    Args:
        model: path of a GGUF (or of the first file of a split set), "demo", or "hf:organisation/repository[:file]"; for
            the transformers engine the folder of a safetensors checkpoint, or "hf:organisation/repository".
        options: how to load it; or the fields of `LoadOptions` by name, as in `load("demo", ram="1GiB")`.
        progress: called with "load" or "prefill", how much is done, and of how much.
        library: a llama.cpp library to use without the self-test (default: the one that is found, tested once by
            `flashmoe.tools.self_test`).
        given: the fields of `LoadOptions`, where `options` is not given.

    Raises ModelError, BudgetError, PolicyError, LibraryError and UsageError, each saying what to do.
    """
    if options is not None and given:
        raise UsageError(f"give either options or {', '.join(given)}, not both")
    wanted = options or LoadOptions(**given)
    interrupted = threading.Event()

    def report_progress(phase: str, done: int, total: int) -> None:
        if interrupted.is_set():
            raise FlashMoEError("loading was interrupted")
        if progress:
            progress(phase, done, total)

    loaded: list[Model] = []
    try:
        # whole, or not at all: where a handler of a signal raises, it ends at the next report of progress
        run_apart(lambda: loaded.append(_load(model, wanted, report_progress, library)), interrupted.set)
        loaded[0].engine.enter_thread()
        return loaded[0]
    except BaseException:
        for opened in loaded:
            opened.close()
        raise


def _load(
    model: str | Path, options: LoadOptions, report_progress: Progress, library: Library | None
) -> Model:
    started = time.perf_counter()
    memory.spare_addresses()
    server = options.server or ServerOptions()
    learns = options.learn and options.engine == LLAMACPP
    make_policy = partial(create, options.policy or default_policy(model))
    evict = make_policy()  # names are known to be good before anything is downloaded
    predictors = create_predictors(options.prefetch)
    auto = options.cache is None and options.ram in (None, AUTO_RAM)
    limit = 0
    if options.cache is None:
        limit = memory.default_ram() if auto else parse_bytes(options.ram or 0)

    def check(catalog: ExpertCatalog) -> None:
        """Take what was learnt of the model, and see that the policy is for it."""
        nonlocal evict, make_policy
        if learns:
            remembered = Remembered(catalog.identity)
            if options.policy is None and (learnt := remembered.trained()):
                make_policy = partial(create, learnt)
                evict = make_policy()
            remembered.recall(evict, len(catalog.layers), catalog.n_experts)
        evict.check_model(catalog.identity)

    def prepare(catalog: ExpertCatalog) -> int:
        """Compile what is compiled; the bytes that policy and predictors take."""
        compile_policy(
            evict, len(catalog.layers), catalog.n_experts, ranking=bool(limit or options.save_cache)
        )
        if predictors:
            scheduler.compile_kernels()
        if options.engine == LLAMACPP:
            import flashmoe.engines.llamacpp.serving.borrow  # noqa: F401 - compiles what the server borrows

            if parse_approx(options.approx) is not None:
                rewriting.compile_kernels()
        predictors[:] = _bind(predictors, catalog, limit if options.prefetch == "auto" else 0)
        memory.release_code()
        return evict.nbytes + sum(p.nbytes for p in predictors)

    loading = Loading(
        model=model,
        options=options,
        limit=limit,
        threads=options.threads or cores(),
        projector_bytes=projector_bytes(server.mmproj) if server.mmproj else 0,
        policy=lambda: make_policy(),
        check=check,
        prepare=prepare,
        progress=lambda done, total: report_progress("load", min(done, total), total),
    )
    with ExitStack() as stack:
        with numa.spreading():
            if options.engine == TRANSFORMERS:
                from flashmoe.runtime.open_checkpoint import open_checkpoint

                opened = open_checkpoint(loading, stack)
            else:
                from flashmoe.runtime.open_gguf import open_gguf

                opened = open_gguf(loading, stack, library)
        catalog, slots, runner = opened.catalog, opened.slots, opened.engine
        pool = SlotPool(catalog, slots, opened.reader)
        stack.callback(pool.close)
        spare = sizing.spare_slots(catalog, slots) if predictors else [0] * len(slots)
        evict.bind(sizing.residency_for(catalog, slots, spare))
        experts = ExpertCache(pool, opened.reader, evict, spare)
        runner.attach(pool, slots, experts)
        if runner.tiers:
            stack.callback(runner.tiers.close)
        rewriter = None
        approximation = parse_approx(options.approx, levels_of(catalog.identity))
        if approximation is not None:
            rewriter = Rewriter(approximation, len(catalog.layers), catalog.n_experts, catalog.top_k)
            runner.approximate(rewriter)
        prefetcher = None
        if predictors and any(spare):
            prefetcher = Prefetcher(predictors, runner.tiers or experts)
            runner.prefetch(prefetcher)
        everyone: list[EvictionPolicy | Predictor] = [evict, *predictors]
        if followers := [one for one in everyone if one.needs_ranking]:
            runner.inform(followers)
        governor = None
        if limit and not runner.tiers:  # copies to a device need slots to stay where they are
            sequences = runner.sequences if isinstance(runner, LlamaEngine) else 1
            needed = sizing.least_slots(catalog, runner.n_ubatch, sequences)
            least = [n + away for n, away in zip(needed, spare, strict=True)]
            governor = Governor(experts, limit, least, gives_way=auto)
            stack.callback(governor.close)
        resources = ExitStack()
        ranked = None
        saved = None
        learning = None
        if learns and rewriter is None:  # else it would learn what is not the model's routing
            learning = Learning(Remembered(catalog.identity), experts, governor)
            resources.callback(learning.keep)
        if options.save_cache:
            session = Session(options.save_cache, catalog, evict, predictors)
            resources.callback(session.save)  # when all else has been freed
            ranked = session.restore()
            if options.engine == LLAMACPP:
                saved = _saved_conversations(session, opened, parse_bytes(options.save_cache_size))
        # while a prompt is read, too: its reads go to this memory, and would commit it themselves, slower
        pool.prefault(lambda: not experts.stepping or experts.phase == "prefill")
        if ranked is not None:
            stack.callback(experts.close)
            experts.warm_start(ranked)
        loaded_model = Model(
            runner,
            experts,
            catalog,
            limit,
            report_progress,
            resources,
            prefetcher=prefetcher,
            layout=opened.layout,
            alternatives=[default_policy(model)],
            server_options=replace(
                server,
                cache_ram_mib=opened.conversations.cache_ram >> 20,
                ctx_checkpoints=opened.conversations.checkpoints,
                slot_save_path=saved.folder if saved else None,
            )
            if options.engine == LLAMACPP
            else None,
            public=options.parallel is not None,
            saved=saved,
            rewriter=rewriter,
            learning=learning,
        )
        if options.trace:
            loaded_model.record()
        loaded_model.telemetry.load_seconds = time.perf_counter() - started
        resources.enter_context(stack.pop_all())
        return loaded_model


def _saved_conversations(session: Session, opened: Opened, most: int) -> SavedConversations | None:
    """Where conversations are kept, beside what else a session leaves; None where none are to be, or can be."""
    from flashmoe.engines.llamacpp.serving.saved import SavedConversations

    engine = opened.engine
    assert isinstance(engine, LlamaEngine)
    if not most or not engine.has_server:
        return None
    saved = SavedConversations(
        session.path.with_suffix(".conversations"), opened.catalog.identity | engine.state_identity, most
    )
    try:
        saved.prepare()
    except OSError as error:
        warnings.warn(
            f"{saved.folder}: conversations will not be kept ({error.strerror})",
            FlashMoEWarning,
            stacklevel=3,
        )
        return None
    return saved


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


def compile_policy(policy: EvictionPolicy, n_layers: int, n_experts: int, *, ranking: bool) -> None:
    """Let numba compile the policy's kernels before memory is counted and before the first token waits for it."""
    policy.bind(make_residency(n_layers, n_experts, np.ones(n_layers, np.int32)))
    ids, out = np.zeros(1, np.int32), np.zeros((3, 1), np.int32)
    policy.begin_sequence()
    policy.access(0, ids, out[0], out[1], out[2])
    policy.request(ids, out[0], out[1], out[2])(0, 1)
    policy.compiled_request(ids, out[0], out[1], out[2])
    policy.access_each(0, ids[np.newaxis], out[0], out[1], out[2])
    policy.window(1, 1)
    if ranking:
        policy.ranking()
    policy.release(0, 0)
