"""A loaded model: generates text, and reports what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe import telemetry
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.embedding import Embedding, embedding_tokens
from flashmoe.engines.base import Engine, Sampling
from flashmoe.errors import UsageError
from flashmoe.generation import Generation, Held, Reuse, Rule
from flashmoe.layout import PLAIN
from flashmoe.prefetch.scheduler import Prefetcher
from flashmoe.routing.recorder import Recorder
from flashmoe.routing.trace import DECODE, PREFILL
from flashmoe.simulate.what_if import WhatIf
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.disk import read_ceiling

#: Called with what is going on ("load" or "prefill"), how much is done, and of how much.
Progress = Callable[[str, int, int], None]


class Model:
    """A loaded model. A context manager; not thread-safe: one generation at a time."""

    def __init__(
        self,
        engine: Engine,
        cache: ExpertCache,
        catalog: ExpertCatalog,
        budget_bytes: int,
        progress: Progress,
        resources: ExitStack,
        prefetcher: Prefetcher | None = None,
        layout: str = PLAIN,
        alternatives: Sequence[str] = (),
    ) -> None:
        self.engine, self.cache, self.catalog, self.prefetcher = engine, cache, catalog, prefetcher
        self.budget_bytes, self.layout = budget_bytes, layout
        self.alternatives = alternatives  # eviction policies that reports try
        self.telemetry = telemetry.Telemetry()
        self.progress, self._resources = progress, resources
        #: What each sequence of the engine holds.
        self.held = [Held() for _ in range(engine.sequences)]
        self.recorder: Recorder | None = None
        self._prompts = -1

    @property
    def model(self) -> Any:
        """The library's own model, with its own `generate`, where the engine is Transformers. Raises UsageError."""
        if not hasattr(self.engine, "model"):
            raise UsageError("this model is run by llama.cpp: load it with engine='transformers' to have one")
        return self.engine.model

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
            if self.engine.tiers:
                self.engine.tiers.begin_sequence()
            if self.prefetcher:
                self.prefetcher.begin_sequence()
            self._prompts += 1
            held.number = self._prompts
        return self.engine.past(sequence)

    def embed(self, text: str | Sequence[int]) -> NDArray[np.float32]:
        """The embedding of a text (or of token ids), float32 [n_embd], of length 1; see `pooling` of `load`.

        Raises UsageError where the model was loaded without pooling, and for an empty or too long text.
        """
        return Embedding(self, embedding_tokens(self.engine, text)).run()

    def evaluate(
        self, tokens: Sequence[int], sequence: int = 0, *, decode: bool, embed: bool = False
    ) -> None:
        """Evaluate tokens of a prompt or a text (at most a micro-batch), or with `decode` one that was made.

        Raises what the engine's `decode` raises.
        """
        phase = self.telemetry.decode if decode else self.telemetry.prefill
        self.cache.phase = "decode" if decode else "prefill"
        faults = telemetry.major_faults()
        began = time.perf_counter()
        try:
            self.engine.decode(tokens, sequence, embed=embed)
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

    def report(self, text: str = "", pause: Callable[[], None] = lambda: None) -> telemetry.Report:
        """The figures so far; `text` is passed through. Measures the drive where that has not been done before.

        pause: called after every millisecond of replaying, by whoever asks while the model is at work.
        """
        what_if = WhatIf(self.cache.recent, self.cache.policy, self.catalog.top_k, pause)
        return telemetry.make_report(
            self.telemetry,
            self.cache.stats,
            model=self.catalog.label,
            policy=self.cache.policy.name,
            prefetch=self.prefetcher.predictor.name if self.prefetcher else "",
            layout=self.layout,
            text=text,
            slots=self.cache.policy.residency.n_slots,
            experts=self.catalog.total_experts,
            expert_bytes=self.catalog.expert_bytes // self.catalog.total_experts,
            misses=what_if.larger,
            others=lambda: what_if.others(self.alternatives),
            budget=self.budget_bytes,
            tiers=self.engine.tiers.figures() if self.engine.tiers else {},
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
