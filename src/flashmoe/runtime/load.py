"""The Python API: `flashmoe.load` gives a Model that generates text under a memory budget."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.cache import sizing
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.pool import SlotPool
from flashmoe.cache.remembered import Remembered
from flashmoe.common import memory, numa
from flashmoe.common.machine import cores
from flashmoe.common.signals import run_apart
from flashmoe.common.units import parse_bytes
from flashmoe.engines.base import Engine
from flashmoe.engines.llamacpp.engine import LlamaEngine
from flashmoe.engines.llamacpp.serving.options import ServerOptions, projector_bytes
from flashmoe.errors import FlashMoEError, UsageError, warn
from flashmoe.prefetch import Predictor
from flashmoe.prefetch.scheduler import Prefetcher
from flashmoe.routing.approximation import parse as parse_approx
from flashmoe.routing.rewrite import Rewriter
from flashmoe.runtime.chosen import Chosen
from flashmoe.runtime.governor import Governor
from flashmoe.runtime.learning import Learning
from flashmoe.runtime.levels import levels_of
from flashmoe.runtime.model import Model, Progress
from flashmoe.runtime.opening import Loading, Opened
from flashmoe.runtime.options import AUTO_RAM, TRANSFORMERS, LoadOptions
from flashmoe.runtime.session import Session
from flashmoe.storage.hub import default_policy

if TYPE_CHECKING:
    from flashmoe.engines.llamacpp.library import Library
    from flashmoe.engines.llamacpp.serving.saved import SavedConversations


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
    chosen = Chosen(model, options)
    auto = options.cache is None and options.ram in (None, AUTO_RAM)
    limit = 0
    if options.cache is None:
        limit = memory.default_ram() if auto else parse_bytes(options.ram or 0)
    server = options.server or ServerOptions()
    loading = Loading(
        model=model,
        options=options,
        limit=limit,
        threads=options.threads or cores(),
        projector_bytes=projector_bytes(server.mmproj) if server.mmproj else 0,
        chosen=chosen,
        progress=lambda done, total: report_progress("load", min(done, total), total),
    )
    with ExitStack() as stack:
        with numa.spreading():
            opened = _open(loading, stack, library)
        spare = (
            sizing.spare_slots(opened.catalog, opened.slots) if chosen.predictors else [0] * len(opened.slots)
        )
        experts = _attach_pool(opened, chosen.policy, spare, stack)
        rewriter = _approximate(opened, options.approx)
        prefetcher = _connect(opened.engine, experts, chosen, prefetches=any(spare))
        governor = None
        if limit and not opened.engine.tiers:  # copies to a device need slots to stay where they are
            governor = Governor(experts, limit, _least_slots(opened, spare), gives_way=auto)
            stack.callback(governor.close)
        resources = ExitStack()
        learning = None
        if chosen.learns and rewriter is None:  # else it would learn what is not the model's routing
            learning = Learning(Remembered(opened.catalog.identity), experts, governor)
            resources.callback(learning.keep)
        ranked = saved = None
        if options.save_cache:
            session = Session(options.save_cache, opened.catalog, chosen.policy, chosen.predictors)
            resources.callback(session.save)  # when all else has been freed
            ranked = session.restore()
            saved = _saved_conversations(session, opened, parse_bytes(options.save_cache_size))
        # while a prompt is read, too: its reads go to this memory, and would commit it themselves, slower
        experts.pool.prefault(lambda: not experts.stepping or experts.phase == "prefill")
        if ranked is not None:
            stack.callback(experts.close)
            experts.warm_start(ranked)
        loaded = Model(
            opened.engine,
            experts,
            opened.catalog,
            limit,
            report_progress,
            resources,
            prefetcher=prefetcher,
            layout=opened.layout,
            alternatives=[default_policy(model)],
            server_options=_server_options(server, opened, saved),
            public=options.parallel is not None,
            saved=saved,
            rewriter=rewriter,
            learning=learning,
        )
        if options.trace:
            loaded.record()
        loaded.telemetry.load_seconds = time.perf_counter() - started
        resources.enter_context(stack.pop_all())
        return loaded


def _open(loading: Loading, stack: ExitStack, library: Library | None) -> Opened:
    if loading.options.engine == TRANSFORMERS:
        from flashmoe.runtime.open_checkpoint import open_checkpoint

        return open_checkpoint(loading, stack)
    from flashmoe.runtime.open_gguf import open_gguf

    return open_gguf(loading, stack, library)


def _attach_pool(opened: Opened, policy: EvictionPolicy, spare: list[int], stack: ExitStack) -> ExpertCache:
    """Make the pool, of which `spare[g]` slots of size group g are for prefetching, and give it to the engine."""
    pool = SlotPool(opened.catalog, opened.slots, opened.reader)
    stack.callback(pool.close)
    policy.bind(sizing.residency_for(opened.catalog, opened.slots, spare))
    experts = ExpertCache(pool, opened.reader, policy, spare)
    opened.engine.attach(pool, opened.slots, experts)
    if opened.engine.tiers:
        stack.callback(opened.engine.tiers.close)
    return experts


def _approximate(opened: Opened, approx: str) -> Rewriter | None:
    """Let routes be rewritten, if that is asked for."""
    catalog = opened.catalog
    approximation = parse_approx(approx, levels_of(catalog.identity))
    if approximation is None:
        return None
    rewriter = Rewriter(approximation, len(catalog.layers), catalog.n_experts, catalog.top_k)
    opened.engine.approximate(rewriter)
    return rewriter


def _connect(engine: Engine, experts: ExpertCache, chosen: Chosen, *, prefetches: bool) -> Prefetcher | None:
    """Let the predictors and the policy see what the engine knows."""
    prefetcher = None
    if prefetches:
        prefetcher = Prefetcher(chosen.predictors, engine.tiers or experts)
        engine.prefetch(prefetcher)
    everyone: list[EvictionPolicy | Predictor] = [chosen.policy, *chosen.predictors]
    if followers := [one for one in everyone if one.needs_ranking]:
        engine.inform(followers)
    return prefetcher


def _least_slots(opened: Opened, spare: list[int]) -> list[int]:
    """Slots of each size group that the engine needs in any case."""
    engine = opened.engine
    sequences = engine.sequences if isinstance(engine, LlamaEngine) else 1
    needed = sizing.least_slots(opened.catalog, engine.n_ubatch, sequences)
    return [n + away for n, away in zip(needed, spare, strict=True)]


def _server_options(
    server: ServerOptions, opened: Opened, saved: SavedConversations | None
) -> ServerOptions | None:
    """What llama.cpp's server is told; None for an engine that is not llama.cpp."""
    if not isinstance(opened.engine, LlamaEngine):
        return None
    return replace(
        server,
        cache_ram_mib=opened.conversations.cache_ram >> 20,
        ctx_checkpoints=opened.conversations.checkpoints,
        slot_save_path=saved.folder if saved else None,
    )


def _saved_conversations(session: Session, opened: Opened, most: int) -> SavedConversations | None:
    """Where conversations are kept, beside what else a session leaves; None where none are to be, or can be."""
    from flashmoe.engines.llamacpp.serving.saved import SavedConversations

    engine = opened.engine
    if not most or not isinstance(engine, LlamaEngine) or not engine.has_server:
        return None
    saved = SavedConversations(
        session.path.with_suffix(".conversations"), opened.catalog.identity | engine.state_identity, most
    )
    try:
        saved.prepare()
    except OSError as error:
        warn(f"{saved.folder}: conversations will not be kept ({error.strerror})", 3)
        return None
    return saved
