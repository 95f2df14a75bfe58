"""What an engine offers to the rest of FlashMoE."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.pool import SlotPool
from flashmoe.errors import UsageError
from flashmoe.prefetch.base import Predictor
from flashmoe.prefetch.scheduler import Ahead, Prefetcher
from flashmoe.routing.recorder import RoutingObserver
from flashmoe.routing.rewrite import Rewriter


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Names are those of llama.cpp's server; None is its default, or the model's own.

    `temperature` 0 is greedy. Those below `seed` are for llama.cpp's server only.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    top_n_sigma: float | None = None
    typical_p: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    repeat_last_n: int | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: tuple[str, ...] | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    adaptive_target: float | None = None
    adaptive_decay: float | None = None
    logit_bias: tuple[tuple[int, float], ...] | None = None  # (token, what is added to its logit)
    ignore_eos: bool | None = None
    samplers: str | None = None  # their order, by llama.cpp's names, separated by semicolons
    grammar: str | None = None
    json_schema: str | None = None

    def request(self) -> dict[str, Any]:
        """What is not left to the server, as fields of a request. Raises UsageError for a schema that is no JSON, and
        for numbers that JSON does not have."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        for name, value in given.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{name} is {value}: give a finite number")
        if self.seed is not None:
            given["seed"] = self.seed & 0xFFFFFFFF
        if self.samplers is not None:
            given["samplers"] = self.samplers.split(";")
        if self.json_schema is not None:
            try:
                given["json_schema"] = json.loads(self.json_schema)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"the JSON schema is no JSON ({error})") from None
            if not isinstance(given["json_schema"], dict | bool):  # the server would leave it out
                raise UsageError("the JSON schema is none: give an object")
        return given

    def chain(self) -> tuple[float, int, float, float]:
        """temperature, top_k, top_p and min_p of an engine's own sampler. Raises UsageError where more is asked for."""
        simple = ("temperature", "top_k", "top_p", "min_p", "seed")
        if more := [name for name in self.request() if name not in simple]:
            raise UsageError(f"only llama.cpp's server knows {', '.join(more)}")
        given = (self.temperature, self.top_k, self.top_p, self.min_p)
        temperature, top_k, top_p, min_p = (
            default if value is None else value
            for value, default in zip(given, (0.8, 40, 0.95, 0.05), strict=True)
        )
        return float(temperature), int(top_k), float(top_p), float(min_p)


class Sampler(Protocol):
    """Chooses tokens; has random numbers of its own."""

    def sample(self) -> int:
        """Choose a token from the logits of the last evaluation."""

    def close(self) -> None: ...


class Tiers(Ahead, Protocol):
    """A tier of experts on a device, in front of the cache in RAM, which reads ahead what the device does not have."""

    def begin_sequence(self) -> None:
        """A new prompt or conversation begins."""

    def figures(self) -> dict[str, float]:
        """Requests of decoding by where the expert was, and copies of all phases; rates in 1e9 bytes per second."""

    def close(self) -> None:
        """End the use of the pool in RAM, before its memory is given back."""


class Engine(Protocol):
    """A loaded model that runs its experts through an ExpertCache."""

    n_ctx: int  # tokens that a sequence can hold
    n_ubatch: int
    n_vocab: int
    pooling: str  # how embeddings are made; "none" where they are not
    n_embd: int  # numbers of an embedding
    kernels: str  # what computes, for reports: "zen4 (AVX-512)"; "" where there is nothing to choose
    kernels_hint: str  # what better ones would be worth, a sentence; "" where there are none

    @property
    def no_text(self) -> str:
        """Why it makes no text, token by token; "" where it does."""

    @property
    def has_server(self) -> bool:
        """Whether llama.cpp's own server can run over it."""

    @property
    def tiers(self) -> Tiers | None:
        """After `attach`, where experts are on a device too."""

    def tokenize(self, text: str, special: bool = False, begin: bool = True) -> list[int]:
        """Token ids of `text`; with `begin` a beginning-of-sequence token first, where the model has one.

        `special`: control tokens that are written out in the text are read as such.
        """

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes that `token` stands for; for a control token none, or with `special` its name."""

    def is_end(self, token: int) -> bool:
        """Whether `token` ends the generation."""

    def attach(self, pool: SlotPool, slots: Sequence[int], cache: ExpertCache) -> None:
        """Let the experts live in `pool`, of `slots[g]` slots in size group g, filled by `cache`: before `decode`."""

    def record(self, recorder: RoutingObserver | None) -> None:
        """Let `recorder` see every layer's routing from here on; the caller of `decode` ends its steps."""

    def prefetch(self, prefetcher: Prefetcher) -> None:
        """Let `prefetcher` see every layer's routing from here on, and read ahead."""

    def approximate(self, rewriter: Rewriter) -> None:
        """Let the routes of decoded tokens be rewritten; after `attach`. Raises UsageError where that cannot be."""

    def inform(self, followers: Sequence[EvictionPolicy | Predictor]) -> None:
        """Tell policies and predictors with `needs_ranking` what the engine knows: the embeddings of tokens, and what
        routers say of decoded ones; after `attach`."""

    def override_routing(self, override: Callable[[int, NDArray[np.int32]], None]) -> None:
        """Let `override` overwrite the ids, (layer, int32 [tokens, top_k]), before they are made resident."""

    def past(self) -> int:
        """Tokens evaluated so far."""

    def decode(self, tokens: Sequence[int], *, embed: bool = False) -> None:
        """Evaluate at most `n_ubatch` tokens after those before; with `embed`, for `embedding`.

        Raises ReadError, and leaves everything as it was.
        """

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        """Logits of the last evaluation, float32 [vocabulary]: of its last token, or of any where all are kept."""

    def embedding(self) -> NDArray[np.float32]:
        """Of the tokens last evaluated with `embed`, pooled, float32 [n_embd]."""

    def sampler(self, sampling: SamplingParams) -> Sampler:
        """A sampler; close it."""

    def rewind(self, n_past: int) -> int:
        """Forget tokens from position `n_past` on, or more; returns how many are left."""

    def enter_thread(self) -> None:
        """Let the calling thread compute with the engine's number of threads, where each thread has its own."""

    def close(self) -> None:
        """Free everything."""


@runtime_checkable
class TemplateEngine(Engine, Protocol):
    """An engine that renders conversations itself."""

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """`messages` ({"role", "content", ...}) in the model's own chat template, up to where the answer begins.

        Raises ModelError where there is no template, or it does not take these messages.
        """
