"""The Python API: `flashmoe.load` gives a Model that generates text under a memory budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil

from flashmoe import budget, telemetry
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.policies import create
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.pool import SlotPool
from flashmoe.cache.residency import make_residency
from flashmoe.engines.base import Sampling
from flashmoe.engines.llamacpp.engine import LlamaEngine
from flashmoe.engines.llamacpp.library import Library, find_library, open_library
from flashmoe.engines.llamacpp.loader import LoadedModel
from flashmoe.engines.llamacpp.token_table import MOST_BYTES
from flashmoe.errors import UsageError
from flashmoe.generation import Generation, Held, Reuse, Rule
from flashmoe.hub import default_policy, resolve
from flashmoe.layout import AUTO, PACKED, PLAIN, REPACKED, check_layout, choose_layout
from flashmoe.prefetch import Predictor
from flashmoe.prefetch import create_all as create_predictors
from flashmoe.prefetch.scheduler import Prefetcher
from flashmoe.routing.recorder import Recorder
from flashmoe.routing.trace import DECODE, PREFILL
from flashmoe.session import Session
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.disk import read_ceiling, tune
from flashmoe.storage.gguf import read_gguf
from flashmoe.storage.pack import find_pack
from flashmoe.storage.reader import ExpertReader
from flashmoe.units import parse_bytes

DEFAULT_CONTEXT = 4096
DEFAULT_UBATCH = 512  # llama.cpp's own
SMALL_UBATCH = 64  # prompts are still read fast
MOST_FOR_PREDICTING = 0.02  # of the budget: slots are worth more
MOST_FOR_BUFFERS = 0.05  # of the pool's memory, where the micro-batch is larger

#: Called with what is going on ("load" or "prefill"), how much is done, and of how much.
Progress = Callable[[str, int, int], None]


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
    save_cache: bool | str | Path = False,
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
    n_ctx: context in tokens (default: the model's, at most 4096).
    n_ubatch: tokens evaluated at once while a prompt is read; the results are llama.cpp's at the same value.
    threads: compute threads (default: physical cores). all_logits: keep the logits of every token, not the last only.
    trace: record which experts every token is routed to, see `Model.recorder`.
    sequences: prompts that can be continued in turns (see `Model.start`); each has a context of `n_ctx` tokens.
    save_cache: keep which experts are resident, and what the policy and the predictors have learned, when the model is
        closed, and go on from there at the next start: in the user's cache folder, or in a file. Off by default: with
        `table` the file holds the ids of tokens that were used.
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
    trained = catalog.gguf.arch_int("context_length", DEFAULT_CONTEXT)
    context = min(trained, DEFAULT_CONTEXT) if n_ctx is None else n_ctx
    if context > trained:
        raise UsageError(
            f"a context of {context} tokens is more than this model was trained for ({trained}); lower -c"
        )
    with ExitStack() as stack:
        pack = find_pack(catalog) if layout != PLAIN else None
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
        aside = reader.set_aside(catalog.largest_placed) if catalog.largest_placed else 0
        _compile(evict, catalog, ranking=bool(save_cache))
        predictors = _bind(predictors, catalog, limit if prefetch == "auto" else 0)
        budget.release_code()
        make = partial(
            LlamaEngine,
            lib,
            loaded,
            n_ctx=context,
            threads=threads or psutil.cpu_count(logical=False) or 1,
            all_logits=all_logits,
            sequences=sequences,
        )
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
        data, anonymous = budget.status_bytes("VmData"), budget.status_bytes("RssAnon")
        engine = make(n_ubatch=step)
        # what the context has reserved (KV cache, compute buffers) and not touched yet will still come
        reserved = budget.status_bytes("VmData") - data
        touched = budget.status_bytes("RssAnon") - anonymous
        to_come = max(0, reserved - touched)
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


def proven_library() -> Library:
    """The llama.cpp library, after it has shown once that the pool works with it. Raises LibraryError."""
    from flashmoe.probe import prove

    path = find_library()
    prove(path)
    return open_library(path)


def _bind(predictors: Sequence[Predictor], catalog: ExpertCatalog, limit: int) -> list[Predictor]:
    """The predictors, compiled and fitted to the model; under a limit only those that take little of it.

    Raises PredictorError.
    """
    most = MOST_FOR_PREDICTING * limit if limit else float("inf")
    predictors = [p for p in predictors if p.least_bytes <= most]
    for predictor in predictors:
        predictor.check_model(catalog.identity)
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


class Model:
    """A loaded model. A context manager; not thread-safe: one generation at a time."""

    def __init__(
        self,
        engine: LlamaEngine,
        cache: ExpertCache,
        catalog: ExpertCatalog,
        budget_bytes: int,
        progress: Progress,
        resources: ExitStack,
        prefetcher: Prefetcher | None = None,
        layout: str = PLAIN,
    ) -> None:
        self.engine, self.cache, self.catalog, self.prefetcher = engine, cache, catalog, prefetcher
        self.budget_bytes, self.layout = budget_bytes, layout
        self.telemetry = telemetry.Telemetry()
        self.progress, self._resources = progress, resources
        #: What each sequence of the engine holds.
        self.held = [Held() for _ in range(engine.sequences)]
        self.recorder: Recorder | None = None
        self._prompts = -1

    def record(self) -> Recorder:
        """Record which experts every token is routed to from here on; `Recorder.save` writes the trace."""
        catalog = self.catalog
        self.recorder = Recorder(
            len(catalog.layers),
            catalog.top_k,
            catalog.n_experts,
            model=catalog.identity,
            first_moe_layer=catalog.layers[0].block,
        )
        self.engine.record(self.recorder)
        return self.recorder

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = -1,
        sampling: Sampling | None = None,
        special: bool = False,
    ) -> Iterator[str]:
        """Continue `prompt` (text, or token ids); yields text as it is made.

        Ends with the model's end token, after `max_tokens` (-1: no limit) or when the context is full. `special`:
        read control tokens written out in the text. Raises UsageError for an empty or too long prompt, ReadError
        when the model file cannot be read; the model stays usable.
        """
        tokens = self.engine.tokenize(prompt, special) if isinstance(prompt, str) else list(prompt)
        yield from self.start(tokens, max_tokens=max_tokens, sampling=sampling).pieces()

    def start(
        self,
        prompt: Sequence[int],
        *,
        sequence: int = 0,
        max_tokens: int = -1,
        sampling: Sampling | None = None,
        reuse: Reuse = Reuse.NONE,
        rules: Iterable[Rule] = (),
        logprobs: int | None = None,
    ) -> Generation:
        """A generation that is run step by step (see `Generation`), for whoever runs several in turns.

        Each of the engine's sequences can have one at a time. Raises UsageError for an empty or too long prompt.
        """
        return Generation(
            self,
            prompt,
            sequence=sequence,
            max_tokens=max_tokens,
            sampling=sampling,
            reuse=reuse,
            rules=rules,
            logprobs=logprobs,
        )

    def chat(
        self, messages: Sequence[dict[str, str]], *, max_tokens: int = -1, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """Answer a conversation, [{"role": "user", "content": "..."}, ...], in the model's own chat template."""
        prompt = self.engine.chat_prompt(messages)
        return self.generate(prompt, max_tokens=max_tokens, sampling=sampling, special=True)

    def keep(self, sequence: int, n: int, *, goes_on: bool) -> int:
        """Another prompt comes to `sequence`, which keeps its first `n` tokens, or fewer; returns how many.

        goes_on: the prompt continues what was there, a conversation; else a new one begins, for policies and traces.
        """
        held = self.held[sequence]
        held.cut(n)
        if self.engine.past(sequence) != n:
            held.cut(self.engine.rewind(n, sequence))
        if not goes_on:
            self.cache.begin_sequence()
            if self.prefetcher:
                self.prefetcher.begin_sequence()
            self._prompts += 1
            held.number = self._prompts
        return self.engine.past(sequence)

    def evaluate(self, tokens: Sequence[int], sequence: int = 0, *, decode: bool) -> None:
        """Evaluate tokens of a prompt (at most a micro-batch), or with `decode` one that was made.

        Raises what the engine's `decode` raises.
        """
        phase = self.telemetry.decode if decode else self.telemetry.prefill
        self.cache.phase = "decode" if decode else "prefill"
        faults = telemetry.major_faults()
        began = time.perf_counter()
        try:
            self.engine.decode(tokens, sequence)
        except BaseException:
            self.held[sequence].cut(self.engine.past(sequence))
            if self.recorder is not None:
                self.recorder.drop_step()
            raise
        self.held[sequence].chunks.append(tuple(tokens))
        phase.seconds += time.perf_counter() - began
        phase.tokens += len(tokens)
        if decode:
            self.telemetry.decode_faults += telemetry.major_faults() - faults
        if self.recorder is not None:
            self.recorder.end_step(tokens, DECODE if decode else PREFILL, self.held[sequence].number)

    @property
    def stats(self) -> dict[str, Any]:
        """The figures so far, as in `flashmoe run --json`."""
        return self.report().as_dict()

    def report(self, text: str = "") -> telemetry.Report:
        """The figures so far; `text` is passed through. Measures the drive where that has not been done before."""
        return telemetry.make_report(
            self.telemetry,
            self.cache.stats,
            model=self.catalog.gguf.files[0].name,
            policy=self.cache.policy.name,
            prefetch=self.prefetcher.predictor.name if self.prefetcher else "",
            layout=self.layout,
            text=text,
            slots=self.cache.policy.residency.n_slots,
            experts=self.catalog.total_experts,
            layers=len(self.catalog.layers),
            expert_bytes=self.catalog.expert_bytes // self.catalog.total_experts,
            misses=self.cache.recent.misses,
            budget=self.budget_bytes,
            warm=(self.cache.warm.experts, self.cache.warm.bytes) if self.cache.warm else (0, 0),
            ceiling=read_ceiling(
                self.cache.reader,
                self.catalog.read_bytes,
                reached=self.telemetry.decode_rate(self.cache.stats["decode"]),
            ),
        )

    def close(self) -> None:
        """Free everything, and keep what `save_cache` asked for. The model cannot be used afterwards."""
        self._resources.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
