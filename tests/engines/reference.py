"""Stock llama.cpp's logits, to compare with: the same library, the same micro-batches, no pool."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import xllamacpp
from numpy.typing import NDArray

from flashmoe.engines.llamacpp.engine import LlamaEngine
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.stock import StockModel
from flashmoe.runtime.layout import PLAIN, REPACKED
from flashmoe.runtime.model import Model

Floats = NDArray[np.float32]

PROMPT_TOKENS, DECODED = 20, 20  # more together than the widest sliding window of the tiny models
CONTEXT = 64


class Evaluates(Protocol):
    """A stock context or a pooled engine."""

    def decode(self, tokens: Sequence[int]) -> Any: ...

    def logits(self, index: int = -1) -> Floats: ...


class Run(NamedTuple):
    """Logits of every prompt token and of every decoded one, [tokens, vocabulary], and the decoded tokens."""

    logits: Floats
    decoded: list[int]


def prompt(n_vocab: int, n: int = PROMPT_TOKENS) -> list[int]:
    """The same tokens for every model, as far as its vocabulary has them."""
    return np.random.default_rng(7).integers(0, min(n_vocab, 256), n).tolist()


def evaluate(
    context: Evaluates, tokens: Sequence[int], n_ubatch: int, forced: Sequence[int] | None = None
) -> Run:
    """Read `tokens` in micro-batches, then decode greedily, or the tokens that are `forced`."""
    logits: list[Floats] = []
    for start in range(0, len(tokens), n_ubatch):
        batch = tokens[start : start + n_ubatch]
        context.decode(batch)
        logits += [context.logits(i) for i in range(len(batch))]
    decoded: list[int] = []
    for step in range(DECODED):
        decoded.append(int(logits[-1].argmax()) if forced is None else forced[step])
        context.decode(decoded[-1:])
        logits.append(context.logits())
    return Run(np.stack(logits), decoded)


class Reference:
    """Stock runs of one model in one layout, each made once."""

    def __init__(self, lib: Library, path: Path, layout: str = PLAIN) -> None:
        self._model = StockModel(lib, path, repack=layout == REPACKED)
        self._runs: dict[tuple[int, int], Run] = {}

    def run(self, n_ubatch: int, threads: int, n_prompt: int = PROMPT_TOKENS) -> Run:
        """Prompt and decoded tokens in micro-batches of `n_ubatch`."""
        key = (min(n_ubatch, n_prompt), threads)
        if key not in self._runs or n_prompt != PROMPT_TOKENS:
            context = self._model.context(n_ctx=CONTEXT, n_ubatch=n_ubatch, threads=threads, all_logits=True)
            try:
                self._runs[key] = evaluate(context, prompt(context.n_vocab, n_prompt), n_ubatch)
            finally:
                context.close()
        return self._runs[key]

    def greedy(self, tokens: Sequence[int], n: int, n_ubatch: int, n_ctx: int = CONTEXT) -> list[int]:
        """`n` tokens after `tokens`, the likeliest each time."""
        context = self._model.context(n_ctx=n_ctx, n_ubatch=n_ubatch, threads=1)
        try:
            for start in range(0, len(tokens), n_ubatch):
                context.decode(tokens[start : start + n_ubatch])
            made: list[int] = []
            while len(made) < n:
                made.append(int(context.logits().argmax()))
                context.decode(made[-1:])
            return made
        finally:
            context.close()

    def close(self) -> None:
        self._model.close()


class StockServer:
    """The library's own server on the same file, loaded by itself, told what `like`'s server is told."""

    def __init__(self, path: Path, like: Model, **more: Any) -> None:
        """more: attributes of common_params."""
        engine = like.engine
        assert isinstance(engine, LlamaEngine)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = engine.n_ctx * engine.sequences, engine.sequences
        params.n_batch, params.n_ubatch = engine.n_batch, engine.n_ubatch
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = engine.threads
        params.no_extra_bufts = like.layout == PLAIN
        params.warmup = params.fit_params = False
        params.use_jinja, params.verbosity = True, 0
        params.cache_ram_mib = 0
        params.hostnames, params.port = ["127.0.0.1"], 0
        for name, value in more.items():
            setattr(params, name, value)
        self._server = xllamacpp.Server(params)

    def complete(self, request: dict[str, Any]) -> list[Any]:
        """The events of a streamed completion."""
        events: list[Any] = []
        self._server.handle_completions({**request, "stream": True}, lambda event: events.append(event))
        return events

    def chat(self, request: dict[str, Any]) -> list[Any]:
        """The events of a streamed chat completion."""
        events: list[Any] = []
        self._server.handle_chat_completions({**request, "stream": True}, lambda event: events.append(event))
        return events

    def text(self, request: dict[str, Any]) -> Iterator[str]:
        """The text of a completion, while it is made."""
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def run() -> None:
            self._server.handle_completions({**request, "stream": True}, events.put)
            events.put(None)

        thread = threading.Thread(target=run)
        thread.start()
        while (event := events.get()) is not None:
            yield "".join(choice["text"] for choice in event.get("choices", ()))
        thread.join()

    def chat_text(self, request: dict[str, Any]) -> str:
        """The answer's text."""
        deltas = (choice["delta"] for event in self.chat(request) for choice in event.get("choices", ()))
        return "".join(delta.get("content") or "" for delta in deltas)

    def chat_end(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The answer's text, and the timings."""
        events = self.chat(request)
        deltas = (choice["delta"] for event in events for choice in event.get("choices", ()))
        text = "".join(delta.get("content") or "" for delta in deltas)
        return text, next(event["timings"] for event in reversed(events) if "timings" in event)

    def close(self) -> None:
        self._server = None

    def __enter__(self) -> StockServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def closing(reference: Reference) -> Iterator[Reference]:
    """For fixtures: give `reference`, then close it."""
    try:
        yield reference
    finally:
        reference.close()
