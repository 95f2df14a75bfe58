"""The llama.cpp engine: a LoadedModel, a Context and the RouterHook that joins them to an ExpertCache."""

from __future__ import annotations

import ctypes as C
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.pool import SlotPool
from flashmoe.common.signals import run_apart
from flashmoe.engines.base import SamplingParams
from flashmoe.engines.llamacpp import kernels
from flashmoe.engines.llamacpp.context import Context
from flashmoe.engines.llamacpp.counts import Evaluated
from flashmoe.engines.llamacpp.embeddings import TokenEmbeddings, table_of
from flashmoe.engines.llamacpp.hook import RouterHook
from flashmoe.engines.llamacpp.library import Library, is_of_wheel
from flashmoe.engines.llamacpp.loader import LoadedModel
from flashmoe.engines.llamacpp.rewriting import GraphRewriter, Ranked
from flashmoe.engines.llamacpp.sampler import Sampler
from flashmoe.engines.llamacpp.served import ServedGraphs
from flashmoe.engines.llamacpp.spinning import Spinning, release_threads
from flashmoe.engines.llamacpp.stack import BYTES_PER_CHARACTER, on_large_stack, raise_thread_stacks
from flashmoe.errors import ClosedError, FlashMoEError, ModelError, UsageError
from flashmoe.prefetch.base import Predictor
from flashmoe.prefetch.scheduler import Prefetcher
from flashmoe.routing.approximation import Approximation
from flashmoe.routing.recorder import Recorder, RoutingObserver
from flashmoe.routing.rewrite import Rewriter

_LONG_TEXT = 4096  # bytes from which on a thread's usual stack may be too small for the tokenizer


class LlamaEngine:
    """Implements `engines.base.Engine`, where its methods are described, with stock llama.cpp.

    Call `attach` before the first `decode`.
    """

    tiers = None  # it computes on the CPU

    def __init__(
        self,
        lib: Library,
        model: LoadedModel,
        *,
        n_ctx: int,
        n_ubatch: int,
        threads: int,
        all_logits: bool = False,
        sequences: int = 1,
        pooling: str = "none",
        cache_types: tuple[str, str] = ("f16", "f16"),
    ) -> None:
        """cache_types: of the KV cache's K and V, see context.CACHE_TYPES."""
        assert model.pointer
        self._lib, self._model = lib, model
        self.kernels, self.kernels_hint = lib.kernels, kernels.hint(lib)
        self._hook = RouterHook(model, n_ubatch, threads)
        self.n_vocab = int(lib.llama_vocab_n_tokens(self._vocab))
        self._context = Context(
            lib,
            model.pointer,
            n_ctx=n_ctx,
            n_ubatch=n_ubatch,
            threads=threads,
            callback=(self._hook.function, self._hook.data),
            all_logits=all_logits,
            sequences=sequences,
            pooling=pooling,
            cache_types=cache_types,
        )
        self.threads, self._cache_types = threads, cache_types
        self._serving = False
        #: How `embedding` is made: one of context.POOLING.
        self.pooling = pooling
        self.n_embd = self._context.n_embd
        #: Bytes of the context's tensors.
        self.tensor_bytes = self._context.tensor_bytes
        self.n_ctx, self.n_ubatch, self.sequences = self._context.n_ctx, n_ubatch, sequences
        with ExitStack() as undo:
            undo.callback(self._context.close)
            outputs = pooling != "none" or not self._context.remembers
            #: What will be taken when the first tokens come: outputs of an embedding's micro-batch, rows of tables.
            self.late_bytes = 4 * n_ubatch * (self.n_vocab + self.n_embd) if outputs else 0
            self.late_bytes += sum(table.bytes_for(n_ubatch) for table in model.tables.values())
            self._spinning = Spinning(lib, threads)
            undo.pop_all()

    def attach(self, pool: SlotPool, slots: Sequence[int], cache: ExpertCache) -> None:
        self._model.attach(pool, slots)
        self._hook.cache = cache

    def record(self, recorder: RoutingObserver | None) -> None:
        self._hook.record(recorder)

    def prefetch(self, prefetcher: Prefetcher) -> None:
        self._hook.prefetch(prefetcher)
        if prefetcher.needs_hidden and not self.no_text and not self.past():  # the context would be lost
            run_apart(self._meet_routers, self._hook.interrupt)

    def _meet_routers(self) -> None:
        """Have the routers known to the first prompt. What fails will fail there, and says why."""
        self._hook.ready()
        self._hook.meet_routers(lambda: self._context.decode([0]))
        self._hook.error = None
        self._context.rewind(0)

    def approximate(self, rewriter: Rewriter) -> None:
        catalog = self._model.catalog
        if catalog.first_value_place:
            raise UsageError(f"{catalog.label}: --approx does not know experts for values: run it without")
        if catalog.top_k == 1:
            raise UsageError(
                f"{catalog.label}: a token has one expert of a layer, and --approx never replaces that"
            )
        assert self._hook.cache
        self._hook.rewriter = GraphRewriter(rewriter, self._hook.cache.policy.residency.slot_of)

    def record_rankings(self, recorder: Recorder) -> None:
        """Let `recorder` have the best 2k experts of every decoded token too; after `attach`. Raises UsageError."""
        self._tell_rankings(recorder.add_ranking)

    def _tell_rankings(self, told: Ranked) -> None:
        catalog = self._model.catalog
        if self._hook.rewriter is None:  # one that rewrites nothing
            layers, experts = len(catalog.layers), catalog.n_experts
            self.approximate(Rewriter(Approximation(""), layers, experts, catalog.top_k))
        assert self._hook.rewriter is not None
        layer_of = {place: layer for layer, place in enumerate(catalog.places)}
        self._hook.rewriter.record_rankings(told, layer_of, 2 * catalog.top_k)

    def inform(self, followers: Sequence[EvictionPolicy | Predictor]) -> None:
        if table := table_of(self._model.catalog.gguf):
            embeddings = TokenEmbeddings(self._lib, table)
            for follower in followers:
                follower.use_embeddings(embeddings)

        def told(layer: int, ids: NDArray[np.int32], scores: NDArray[np.float32], *_: Any) -> None:
            if len(ids) == 1:
                for follower in followers:
                    follower.rank(layer, ids[0], scores[0])

        with suppress(UsageError):  # a form of routing whose scores are not known: the picks have to do
            self._tell_rankings(told)

    def override_routing(self, override: Callable[[int, NDArray[np.int32]], None]) -> None:
        self._hook.override(override)

    @property
    def library(self) -> Library:
        return self._lib

    @cached_property
    def no_text(self) -> str:
        if self._context.remembers:
            return ""
        if self._lib.llama_model_is_diffusion(self._model.pointer):
            return "a diffusion model makes a text as a whole, by a program of llama.cpp's own (llama-diffusion-cli)"
        return "this model is an encoder: it makes embeddings, no text"

    @cached_property
    def has_server(self) -> bool:
        """Whether the library is the wheel's, which carries llama.cpp's server."""
        return is_of_wheel(self._lib.path)

    @property
    def path(self) -> Path:
        """The model's first file."""
        return self._model.catalog.gguf.files[0]

    @property
    def state_identity(self) -> dict[str, Any]:
        """What a saved state depends on beside the model, JSON."""
        return {
            "library": self._lib.build.name,
            "kernels": self._lib.kernels,
            "cache_types": list(self._cache_types),
        }

    @property
    def model_pointer(self) -> int:
        """The llama_model. Raises ClosedError where it has been freed."""
        if not self._model.pointer:
            raise ClosedError
        return self._model.pointer

    @property
    def context_pointer(self) -> int:
        """The llama_context."""
        return self._context.pointer

    @property
    def n_batch(self) -> int:
        """Tokens that the library takes at once, to evaluate them in micro-batches."""
        return self._context.n_batch

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token's text, at most."""
        text, vocab = self._lib.llama_vocab_get_text, self._vocab
        return max(len(text(vocab, token) or b"") for token in range(self.n_vocab))

    @cached_property
    def longest_text(self) -> int:
        """Bytes of the longest text that is worth tokenizing: longer ones fit neither the context nor the stack."""
        fitting, stack = self.n_ctx * self.longest_token, raise_thread_stacks()
        return min(fitting, stack // BYTES_PER_CHARACTER) if stack else fitting

    def checkpoint_bytes(self) -> int:
        """What a checkpoint of one sequence takes, of a memory that cannot be cut anywhere; 0 where it can be."""
        with self.ignoring():
            # in the thread of every evaluation, which has the library's threads
            size = run_apart(self._context.partial_state_bytes, lambda: None)
        return size

    def serve(
        self,
        on_prompt: Callable[[], Any],
        on_graph: Callable[[Evaluated], None],
        on_error: Callable[[BaseException], None],
    ) -> int:
        """The library's server evaluates from here on, until `unserve`; see `ServedGraphs`."""
        run_apart(partial(release_threads, self._lib), lambda: None)
        self._serving = True
        return self._hook.serve(ServedGraphs(self.sequences, self.n_vocab, on_prompt, on_graph, on_error))

    def collect(self) -> None:
        """Count what the server has evaluated without Python."""
        self._hook.collect()

    def unserve(self) -> None:
        """The server has gone."""
        self._hook.collect()
        self._serving = False
        self._lib.keep_log()
        self._context.reclaim()
        self.rewind(0)

    @contextmanager
    def ignoring(self) -> Iterator[None]:
        """Let graphs that are evaluated meanwhile end at once, uncounted."""
        self._hook.ignore(True)
        try:
            yield
        finally:
            self._hook.ignore(False)
            self._lib.keep_log()

    def wait_until_idle(self) -> None:
        """Until the server evaluates no graph; call it while they are ignored."""
        self._hook.wait_until_idle()

    def past(self) -> int:
        return self._context.past

    def decode(self, tokens: Sequence[int], *, embed: bool = False) -> None:
        if self._serving:
            raise UsageError("the model's context is its server's: close that first")
        before = self._context.past
        if len(tokens) > self.n_ubatch:
            raise UsageError(f"at most {self.n_ubatch} tokens can be evaluated at once, not {len(tokens)}")
        if before + len(tokens) > self.n_ctx:
            raise FlashMoEError(
                f"the context is full: {before + len(tokens)} tokens of {self.n_ctx}; use a larger one (-c)"
            )
        self._hook.ready()
        try:
            run_apart(partial(self._decode, tokens, embed), self._hook.interrupt)
        except BaseException:
            self.rewind(before)
            raise

    def _decode(self, tokens: Sequence[int], embed: bool) -> None:
        self._hook.begin(tokens, embed=embed)
        status = self._hook.evaluate(lambda: self._context.decode(tokens, embed=embed))
        if self._hook.error or status:
            raise self._hook.error or ModelError(
                f"llama.cpp failed to evaluate {len(tokens)} tokens (status {status})"
            )

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        return self._context.logits(index)

    def embedding(self) -> NDArray[np.float32]:
        return self._context.embedding()

    def sampler(self, sampling: SamplingParams) -> Sampler:
        return Sampler(self._lib, self._context, sampling)

    def rewind(self, n_past: int) -> int:
        run_apart(partial(self._context.rewind, n_past), lambda: None)
        return self._context.past

    def tokenize(self, text: str, special: bool = False, begin: bool = True) -> list[int]:
        data = text.encode(errors="replace")  # JSON can hold half a character
        if len(data) > self.longest_text:
            raise UsageError(
                f"a text of {len(data)} bytes does not fit in the context of {self.n_ctx} tokens: "
                "shorten it, or raise -c"
            )
        if len(data) > _LONG_TEXT:
            return on_large_stack(partial(self._tokenize, data, special, begin))
        return self._tokenize(data, special, begin)

    @property
    def _vocab(self) -> int:
        """The llama_vocab. Raises ClosedError where it has been freed with the model."""
        pointer: int = self._lib.llama_model_get_vocab(self.model_pointer)
        return pointer

    def _tokenize(self, data: bytes, special: bool, begin: bool) -> list[int]:
        room = len(data) + 8
        tokens = (C.c_int32 * room)()
        n = self._lib.llama_tokenize(self._vocab, data, len(data), tokens, room, begin, special)
        if n < 0:
            raise ModelError(f"llama.cpp cannot tokenize this text ({-n} tokens for {len(data)} bytes)")
        return list(tokens[:n])

    def piece(self, token: int, special: bool = False) -> bytes:
        room = 64
        while True:
            buffer = C.create_string_buffer(room)
            n = self._lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            room = -n

    def is_end(self, token: int) -> bool:
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def enter_thread(self) -> None:
        """Nothing: the context has the number of threads."""

    def close(self) -> None:
        """Free the context; the model is its loader's."""
        self._spinning.close()
        self._context.close()
        self._hook.close()
