"""The Python API: `flashmoe.load` gives a Model that generates text under a memory budget."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flashmoe.cache import sizing
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.policies import create
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.pool import SlotPool
from flashmoe.cache.residency import make_residency
from flashmoe.common import memory
from flashmoe.common.machine import cores
from flashmoe.common.units import parse_bytes
from flashmoe.engines.llamacpp.context import CACHE_TYPES
from flashmoe.engines.llamacpp.engine import LlamaEngine
from flashmoe.engines.llamacpp.serving.options import ServerOptions, projector_bytes
from flashmoe.errors import FlashMoEWarning, UsageError
from flashmoe.prefetch import Predictor
from flashmoe.prefetch import create_all as create_predictors
from flashmoe.prefetch.scheduler import Prefetcher
from flashmoe.runtime.layout import AUTO, check_layout
from flashmoe.runtime.model import Model, Progress
from flashmoe.runtime.options import LoadOptions, Opened
from flashmoe.runtime.session import Session
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.hub import default_policy

if TYPE_CHECKING:
    from flashmoe.engines.llamacpp.library import Library
    from flashmoe.engines.llamacpp.serving.saved import SavedConversations

ENGINES = (LLAMACPP, TRANSFORMERS) = ("llama.cpp", "transformers")
DEFAULT_UBATCH = 512  # llama.cpp's own
DEFAULT_SAVED = "4GiB"  # of conversations on the drive
MOST_FOR_PREDICTING = 0.02  # of the budget: slots are worth more


def load(
    model: str | Path,
    *,
    engine: str = LLAMACPP,
    ram: str | int | None = None,
    cache: str | None = None,
    vram: str | int | None = None,
    policy: str | None = None,
    prefetch: str = "auto",
    layout: str = AUTO,
    n_ctx: int | None = None,
    n_ubatch: int = DEFAULT_UBATCH,
    threads: int | None = None,
    all_logits: bool = False,
    trace: bool = False,
    parallel: int | None = None,
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    cache_ram: str | int | None = None,
    server: ServerOptions | None = None,
    pooling: str = "none",
    save_cache: bool | str | Path = False,
    save_cache_size: str | int = DEFAULT_SAVED,
    verify: bool = False,
    progress: Progress | None = None,
    library: Library | None = None,
) -> Model:
    """Load an MoE model whose experts stay on the SSD.

    model: path of a GGUF (or of the first file of a split set), "demo", or "hf:organisation/repository[:file]"; for the
        transformers engine the folder of a safetensors checkpoint, or "hf:organisation/repository".
    engine: "llama.cpp", or "transformers": Hugging Face's own model, as `.model`, in BF16, F16 or F32.
    ram: memory for the whole process, for example "6GiB"; by default a share of what is available.
    cache: sizes the expert pool directly instead: "25%" of the experts, "2GiB", or a number of slots ("300").
    vram: of the transformers engine: compute on the GPU, with a tier of experts there in front of those in RAM: "50%"
        of the experts, or a size of all that the model takes there ("16GiB"). Without it the CPU computes.
    policy: eviction policy, NAME or NAME:FILE (default: lfu-aged, or what is bundled with the demo model).
    prefetch: predictor of the next layer's experts: "gate", "table", "promoe:FILE", "moe-infinity", "none", or "auto":
        the first of gate and table that is worth asking on this text, and none where neither is.
    layout: of all weights. "plain": the file's; "repacked": those that llama.cpp's default chooses for this processor;
        "auto": repacked where that is faster. The results are llama.cpp's with the same layouts.
    n_ctx: context in tokens of one conversation (default: the model's, and less, down to 1024, where it would take more
        than a sixth of what the weights leave of the budget, or a third for 32768: slots are worth more).
    n_ubatch: tokens evaluated at once while a prompt is read; the results are the engine's at the same value.
    threads: compute threads (default: physical cores). all_logits: keep the logits of every token, not the last only.
    trace: record which experts every token is routed to, see `Model.recorder`.
    parallel: conversations that llama.cpp's server (`Model.server`) holds at once and evaluates together, each with
        `n_ctx` tokens of context; 0: up to four, as far as they take no more than a third of what the weights leave.
    cache_type_k, cache_type_v: types of the KV cache: f16, q8_0, ... (llama.cpp's names).
    cache_ram: memory for conversations that no slot of the server holds (default: a share with `parallel`, else none).
    server: what else the server is told (chat template, reasoning, projector, defaults of samplers).
    pooling: how `Model.embed` makes one vector of a text's tokens: "last", "mean", "cls", or "auto": as the file says.
        It costs memory: every token of a micro-batch then has logits. "none": no embeddings.
    save_cache: keep which experts are resident, and what the policy and the predictors have learned, when the model is
        closed, and go on from there at the next start: in the user's cache folder, or in a file. Off by default: with
        `table` the file holds the ids of tokens that were used. The conversations that the server's slots hold then
        are kept too, as tokens and states, in a folder beside it.
    save_cache_size: what conversations may take of the drive; 0 keeps none.
    verify: compare every slice of an expert with its checksum (`flashmoe.verify`) when it is first read; one that
        differs is a ReadError.
    library: a llama.cpp library to use unproven (default: the one that is found, tested once by
        `flashmoe.tools.self_test`).

    Raises ModelError, BudgetError, PolicyError, LibraryError and UsageError, each saying what to do.
    """
    started = time.perf_counter()
    report_progress = progress or (lambda *_: None)
    if ram is not None and cache is not None:
        raise UsageError("give either a budget (ram) or a pool size (cache), not both")
    if n_ubatch < 1 or (threads is not None and threads < 1) or (n_ctx is not None and n_ctx < 1):
        raise UsageError("context, micro-batch and threads must be at least 1")
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}: choose from {', '.join(ENGINES)}")
    if vram is not None and engine != TRANSFORMERS:
        raise UsageError("--vram is for --engine transformers: llama.cpp computes on the CPU here")
    if parallel is not None and parallel < 0:
        raise UsageError("parallel must be at least 1, or 0 for as many as fit")
    if unknown := {cache_type_k, cache_type_v} - CACHE_TYPES.keys():
        raise UsageError(
            f"unknown type of a KV cache {unknown.pop()!r}: choose from {', '.join(CACHE_TYPES)}"
        )
    check_layout(layout)
    server = server or ServerOptions()
    make_policy = partial(create, policy or default_policy(model))
    evict = make_policy()
    predictors = create_predictors(prefetch)
    limit = 0 if cache is not None else parse_bytes(ram) if ram is not None else memory.default_ram()

    def prepare(catalog: ExpertCatalog) -> int:
        """Compile what is compiled; the bytes that the predictors take."""
        compile_policy(evict, len(catalog.layers), catalog.n_experts, ranking=bool(save_cache))
        predictors[:] = _bind(predictors, catalog, limit if prefetch == "auto" else 0)
        memory.release_code()
        return sum(p.nbytes for p in predictors)

    options = LoadOptions(
        model=model,
        limit=limit,
        cache=cache,
        vram=None if vram is None else str(vram),
        n_ctx=n_ctx,
        n_ubatch=n_ubatch,
        threads=threads or cores(),
        all_logits=all_logits,
        parallel=parallel,
        cache_types=(cache_type_k, cache_type_v),
        cache_ram=parse_bytes(cache_ram) if cache_ram is not None else 0 if parallel is None else None,
        projector_bytes=projector_bytes(server.mmproj) if server.mmproj else 0,
        pooling=pooling,
        layout=layout,
        verify=verify,
        policy=make_policy,
        check=lambda catalog: evict.check_model(catalog.identity),
        prepare=prepare,
        progress=lambda done, total: report_progress("load", min(done, total), total),
    )
    with ExitStack() as stack:
        if engine == TRANSFORMERS:
            from flashmoe.runtime.open_checkpoint import open_checkpoint

            opened = open_checkpoint(options, stack)
        else:
            from flashmoe.runtime.open_gguf import open_gguf

            opened = open_gguf(options, stack, library)
        catalog, slots, runner = opened.catalog, opened.slots, opened.engine
        pool = SlotPool(catalog, slots, opened.reader)
        stack.callback(pool.close)
        spare = sizing.spare_slots(catalog, slots) if predictors else [0] * len(slots)
        evict.bind(sizing.residency_for(catalog, slots, spare))
        experts = ExpertCache(pool, opened.reader, evict, spare)
        runner.attach(pool, slots, experts)
        if runner.tiers:
            stack.callback(runner.tiers.close)
        prefetcher = None
        if predictors and any(spare):
            prefetcher = Prefetcher(predictors, runner.tiers or experts)
            runner.prefetch(prefetcher)
        resources = ExitStack()
        ranked = None
        saved = None
        if save_cache:
            session = Session(save_cache, catalog, evict, predictors)
            resources.callback(session.save)  # when all else has been freed
            ranked = session.restore()
            if engine == LLAMACPP:
                saved = _saved_conversations(session, opened, parse_bytes(save_cache_size))
        pool.prefault()
        if ranked is not None:
            stack.callback(experts.close)
            experts.warm_start(ranked)
        resources.enter_context(stack.pop_all())
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
            if engine == LLAMACPP
            else None,
            public=parallel is not None,
            saved=saved,
        )
        if trace:
            loaded_model.record()
        loaded_model.telemetry.load_seconds = time.perf_counter() - started
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
    policy.access_each(0, ids[np.newaxis], out[0], out[1], out[2])
    policy.window(1, 1)
    if ranking:
        policy.ranking()
    policy.release(0, 0)
