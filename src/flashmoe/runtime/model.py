"""A loaded model: generates text, and reports what it took."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.stats import CacheStats
from flashmoe.common.signals import run_apart
from flashmoe.engines.base import Engine, SamplingParams, TemplateEngine
from flashmoe.errors import UsageError
from flashmoe.prefetch.scheduler import Prefetcher
from flashmoe.routing.recorder import Recorder
from flashmoe.routing.rewrite import Rewriter, Rewritten
from flashmoe.runtime.decoder import Decoder
from flashmoe.runtime.embedding import embed
from flashmoe.runtime.generation import Generation, Progress, check_prompt
from flashmoe.runtime.layout import PLAIN
from flashmoe.runtime.learning import Learning
from flashmoe.runtime.report import Report
from flashmoe.runtime.telemetry import Telemetry, make_report
from flashmoe.storage.catalog import ExpertCatalog

if TYPE_CHECKING:
    from flashmoe.engines.llamacpp.counts import Evaluated
    from flashmoe.engines.llamacpp.serving.options import ServerOptions
    from flashmoe.engines.llamacpp.serving.saved import SavedConversations
    from flashmoe.engines.llamacpp.serving.server import InnerServer

_log = logging.getLogger(__name__)


class Model:
    """A loaded model. A context manager. One generation at a time: the next one ends that of `start`."""

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
        server_options: ServerOptions | None = None,
        public: bool = False,
        saved: SavedConversations | None = None,
        rewriter: Rewriter | None = None,
        learning: Learning | None = None,
    ) -> None:
        """public: prompts come to the server from other processes too: nothing else tells where one begins.

        saved: where the server's conversations are kept when the model is closed.
        """
        self.engine, self.cache, self.catalog, self.prefetcher = engine, cache, catalog, prefetcher
        self.decoder = Decoder(engine, cache, prefetcher, self._own_context)
        self.budget_bytes, self.layout = budget_bytes, layout
        self.alternatives = alternatives  # eviction policies that reports try first
        self.progress, self._resources = progress, resources
        self._server_options = server_options
        self._server: InnerServer | None = None
        self._access = self.decoder.access
        self._public, self._saved = public, saved
        self._rewriter = rewriter
        self.learning = learning  # what it leaves to the next session; None where it leaves nothing

    @property
    def model(self) -> Any:
        """The library's own model, with its own `generate`, where the engine is Transformers. Raises UsageError."""
        if not hasattr(self.engine, "model"):
            raise UsageError("this model is run by llama.cpp: load it with engine='transformers' to have one")
        return self.engine.model

    @property
    def telemetry(self) -> Telemetry:
        """Tokens and seconds so far."""
        self._collect()
        return self.decoder.telemetry

    @property
    def cache_stats(self) -> Mapping[str, CacheStats]:
        """The expert cache's counters so far, by phase."""
        self._collect()
        return self.cache.stats

    @property
    def rewritten(self) -> Rewritten | None:
        """How far decoded tokens' routing so far differs from the model's; None for an exact run."""
        return self._rewriter.rewritten if self._rewriter else None

    def exactly(self) -> AbstractContextManager[None]:
        """No route is rewritten meanwhile, whatever it was loaded with; from any thread."""
        return self._rewriter.exactly() if self._rewriter else nullcontext()

    def _collect(self) -> None:
        """Have counted what the server has evaluated without Python."""
        if self._server is not None:
            self._server.collect()

    def record(self, *, ranked: bool = False) -> Recorder:
        """Record which experts every token is routed to from here on; `Recorder.save` writes the trace.

        ranked: of decoded tokens also what the router ranked next, for the simulation of approximations; slower.
        Raises UsageError where that is not known.
        """
        catalog = self.catalog
        recorder = Recorder(
            len(catalog.layers),
            catalog.top_k,
            catalog.n_experts,
            model=catalog.identity,
            first_moe_layer=catalog.layers[0].block,
            ranked=ranked,
        )
        if ranked:
            from flashmoe.engines.llamacpp.engine import LlamaEngine

            if not isinstance(self.engine, LlamaEngine):
                raise UsageError("rankings are recorded with llama.cpp")
            self.engine.record_rankings(recorder)
        self.decoder.record(recorder)
        return recorder

    @property
    def recorder(self) -> Recorder | None:
        """What `record` gave, if anything records."""
        return self.decoder.recorder

    def server(self) -> InnerServer:
        """llama.cpp's own server over this model, in this process; started when it is first asked for.

        It has the model's context until `close`, or until `start`, `evaluate` or `embed` want it back. Raises
        UsageError for the transformers engine and where the model is closed, and LibraryError where the library has no
        server.
        """
        with self._access.alone:
            self._access.check()
            if self._server is None:
                if self._server_options is None:
                    raise UsageError(
                        "this model is run by Transformers, which has no server: use engine='llama.cpp'"
                    )
                from flashmoe.engines.llamacpp.engine import LlamaEngine
                from flashmoe.engines.llamacpp.serving.server import InnerServer

                assert isinstance(self.engine, LlamaEngine)
                self.decoder.turn += 1
                on_prompt = self.decoder.begin_prompt if self._public else lambda: None
                self._server = InnerServer(
                    self.engine, self._server_options, self._served, on_prompt, self.decoder.failed
                )
                if self._saved:
                    self._saved.restore(self._server)
            return self._server

    def _served(self, graph: Evaluated) -> None:
        """The server has evaluated a graph."""
        self.decoder.evaluated(graph.tokens, graph.seconds, graph.faults, decode=graph.decode)

    def _own_context(self) -> None:
        """Take the context back from the server. The caller holds `Access.alone`."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = -1,
        sampling: SamplingParams | None = None,
        special: bool = False,
    ) -> Iterator[str]:
        """Continue `prompt` (text, or token ids); yields text as it is made.

        Ends with the model's end token, after `max_tokens` (-1: no limit) or when the context is full. `special`:
        read control tokens written out in the text. Raises UsageError for an empty or too long prompt, ReadError
        when the model file cannot be read; the model stays usable.
        """
        self._check_makes_text()
        tokens = self.engine.tokenize(prompt, special) if isinstance(prompt, str) else list(prompt)
        check_prompt(tokens, self.engine.n_ctx)
        if not self.engine.has_server:
            yield from self.start(tokens, max_tokens=max_tokens, sampling=sampling).stream()
            return
        if max_tokens == 0:
            return
        # nothing of earlier prompts: kernels for one token round otherwise than kernels for several
        request = self._request(max_tokens, sampling) | {"prompt": tokens, "cache_prompt": False}
        for event in self._stream(self.server().complete(request)):
            if piece := event["choices"][0]["text"] if event.get("choices") else "":
                yield piece

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int = -1,
        sampling: SamplingParams | None = None,
        **request: Any,
    ) -> Iterator[str]:
        """Answer a conversation, [{"role": "user", "content": "..."}, ...], in the model's own chat template.

        Yields the answer's text; see `stream_chat` for thoughts and calls of tools. request: further fields of a
        request to llama.cpp's server (`tools`, `chat_template_kwargs`, ...). Raises as `generate` does, and UsageError
        where the template does not take these messages.
        """
        for delta in self.stream_chat(messages, max_tokens=max_tokens, sampling=sampling, **request):
            if piece := delta.get("content"):
                yield piece

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int = -1,
        sampling: SamplingParams | None = None,
        goes_on: bool = False,
        **request: Any,
    ) -> Iterator[dict[str, Any]]:
        """`chat` in OpenAI's deltas: "content", "reasoning_content", "tool_calls"; the last has "finish_reason" and
        "timings" (llama.cpp's figures of the answer).

        goes_on: the messages continue the last conversation, for policies and traces.
        """
        self._check_makes_text()
        if not self.engine.has_server:
            yield from self._chat_without_server(messages, max_tokens, sampling, request)
            return
        body = self._request(max_tokens, sampling, goes_on=goes_on) | {"messages": list(messages), **request}
        for event in self._stream(self.server().chat(body)):
            for choice in event.get("choices", ()):
                delta = {name: value for name, value in choice["delta"].items() if value}
                if choice.get("finish_reason"):
                    delta |= {"finish_reason": choice["finish_reason"], "timings": event.get("timings", {})}
                if delta:
                    yield delta

    def _chat_without_server(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int,
        sampling: SamplingParams | None,
        request: Mapping[str, Any],
    ) -> Iterator[dict[str, Any]]:
        """With the checkpoint's own template, which the transformers engine has."""
        if not isinstance(self.engine, TemplateEngine):
            self.server()  # says why there is none
        assert isinstance(self.engine, TemplateEngine)
        if request:
            raise UsageError(f"the transformers engine does not know {', '.join(request)}")
        # the library's templates write the token that a text begins with, as far as the model wants one
        tokens = self.engine.tokenize(self.engine.chat_prompt(messages), True, begin=False)
        generation = self.start(tokens, max_tokens=max_tokens, sampling=sampling)
        for piece in generation.stream():
            yield {"content": piece}
        yield {"finish_reason": generation.finished, "timings": {}}

    def _check_makes_text(self) -> None:
        """Raises UsageError where the model makes none, or none any more."""
        self._access.check()
        if reason := self.engine.no_text:
            raise UsageError(
                f"{self.catalog.label}: {reason}; for embeddings use `flashmoe serve --pooling mean`, or Model.embed"
            )

    def _request(
        self, max_tokens: int, sampling: SamplingParams | None, *, goes_on: bool = False
    ) -> dict[str, Any]:
        """What every request of this process says. A new prompt begins, for policies and traces."""
        if not goes_on:
            self.decoder.begin_prompt()
        return {
            "n_predict": max_tokens,
            "return_progress": True,
            "cache_prompt": self.recorder is None,  # a trace has every token of its prompts
            **(sampling or SamplingParams()).request(),
        }

    def _stream(self, events: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """`events` without those of progress, which is passed on. Closing it cancels the request."""
        try:
            for event in events:
                if done := event.get("prompt_progress"):
                    self.progress("prefill", done["processed"], done["total"])
                    continue
                if event.get("choices"):
                    self.decoder.telemetry.token_made()
                yield event
        finally:
            events.close()  # type: ignore[attr-defined]

    def start(
        self, prompt: Sequence[int], *, max_tokens: int = -1, sampling: SamplingParams | None = None
    ) -> Generation:
        """A generation by the engine's own loop, run step by step (see `Generation`): one at a time.

        Raises UsageError for an empty or too long prompt.
        """
        self._check_makes_text()
        return Generation(self.decoder, prompt, self.progress, max_tokens=max_tokens, sampling=sampling)

    def embed(self, text: str | Sequence[int]) -> NDArray[np.float32]:
        """The embedding of a text (or of token ids), float32 [n_embd], of length 1; see `pooling` of `load`.

        Raises UsageError where the model was loaded without pooling, and for an empty or too long text.
        """
        with self._access.alone:
            self._access.check()
            return embed(self.decoder, text)

    @property
    def stats(self) -> dict[str, Any]:
        """The figures so far, as in `flashmoe run --json`."""
        return self.report().as_dict()

    def report(self, text: str = "", pause: Callable[[], None] = lambda: None) -> Report:
        """The figures so far; `text` is passed through. Measures the drive where that has not been done before.

        pause: called after every millisecond of replaying; for callers that run while the model is at work.
        """
        return make_report(self, text, pause)

    def close(self) -> None:
        """Free everything, and keep what `save_cache` asked for. The model cannot be used afterwards.

        A forked process has nothing to free: the model is that of its parent.
        """
        if self._access.forked:
            return
        with self._access.alone:
            if not self._access.closed:
                run_apart(self._close, lambda: None)  # whole, whatever signals arrive meanwhile

    def _close(self) -> None:
        self._access.closed = True
        if self._server is not None and self._saved:
            self._server.cancel()
            self._saved.save(self._server)
        self._own_context()
        if self.cache.staging.dropped:
            _log.info("prefetches dropped before their end: %d", self.cache.staging.dropped)
        self._resources.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
