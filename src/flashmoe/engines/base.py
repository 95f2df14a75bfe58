"""What an engine offers to the rest of FlashMoE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.pool import SlotPool
from flashmoe.prefetch.scheduler import Prefetcher
from flashmoe.routing.recorder import RoutingObserver


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy. Names and defaults are llama.cpp's."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None


class Sampler(Protocol):
    """Chooses tokens; has random numbers of its own."""

    def sample(self) -> int:
        """Choose a token from the logits of the last evaluation."""
        ...

    def close(self) -> None: ...


class Tiers(Protocol):
    """A tier of experts on a device, in front of the cache in RAM."""

    @property
    def policy(self) -> EvictionPolicy:
        """Of the cache in RAM."""
        ...

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """`ExpertCache.prefetch` for experts that the device does not have."""
        ...

    def begin_sequence(self) -> None:
        """A new prompt or conversation begins."""
        ...

    def figures(self) -> dict[str, float]:
        """Requests of decoding by where the expert was, and copies of all phases; rates in 1e9 bytes per second."""
        ...

    def close(self) -> None:
        """End the use of the pool in RAM, before its memory is given back."""
        ...


class Engine(Protocol):
    """A loaded model that runs its experts through an ExpertCache. Several sequences of tokens, one at a time."""

    n_ctx: int  # tokens that a sequence can hold
    n_ubatch: int
    n_vocab: int
    sequences: int
    pooling: str  # how embeddings are made; "none" where they are not
    n_embd: int  # numbers of an embedding

    @property
    def tiers(self) -> Tiers | None:
        """After `attach`, where experts are on a device too."""
        ...

    def tokenize(self, text: str, special: bool = False, begin: bool = True) -> list[int]:
        """Token ids of `text`; with `begin` a beginning-of-sequence token first, where the model has one.

        `special`: control tokens that are written out in the text are read as such.
        """
        ...

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes that `token` stands for; for a control token none, or with `special` its name."""
        ...

    def is_end(self, token: int) -> bool:
        """Whether `token` ends the generation."""
        ...

    def chat_prompt(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        answer: bool = True,
    ) -> str:
        """`messages` ({"role", "content", ...}) in the model's own chat template, up to where the answer begins.

        tools: what the model may call, as in OpenAI's requests. answer: False to end with the last message.
        Raises ModelError where there is no template, or it does not take these messages.
        """
        ...

    def attach(self, pool: SlotPool, slots: Sequence[int], cache: ExpertCache) -> None:
        """Let the experts live in `pool`, of `slots[g]` slots in size group g, filled by `cache`: before `decode`."""
        ...

    def record(self, recorder: RoutingObserver | None) -> None:
        """Let `recorder` see every layer's routing from here on; whoever calls `decode` ends its steps."""
        ...

    def prefetch(self, prefetcher: Prefetcher) -> None:
        """Let `prefetcher` see every layer's routing from here on, and read ahead."""
        ...

    def override_routing(self, override: Callable[[int, NDArray[np.int32]], None]) -> None:
        """Let `override` overwrite the ids, (layer, int32 [tokens, top_k]), before they are made resident."""
        ...

    def past(self, sequence: int = 0) -> int:
        """Tokens in a sequence."""
        ...

    def decode(self, tokens: Sequence[int], sequence: int = 0, *, embed: bool = False) -> None:
        """Evaluate at most `n_ubatch` tokens after those of a sequence; with `embed`, for `embedding`.

        Raises ReadError, or what `interrupt` was given, and leaves the sequence as it was.
        """
        ...

    def interrupt(self, error: BaseException) -> None:
        """From another thread: end the evaluation under way, which takes its tokens back and raises `error`."""
        ...

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        """Logits of the last evaluation, float32 [vocabulary]: of its last token, or of any where all are kept."""
        ...

    def embedding(self, sequence: int = 0) -> NDArray[np.float32]:
        """Of the tokens last evaluated with `embed`, pooled, float32 [n_embd]."""
        ...

    def live_logits(self) -> NDArray[np.float32]:
        """Logits of the last evaluation, float32 [vocabulary], in the engine's memory: samplers see changes."""
        ...

    def sampler(self, sampling: Sampling) -> Sampler:
        """A sampler; close it."""
        ...

    def rewind(self, n_past: int, sequence: int = 0) -> int:
        """Forget a sequence's tokens from position `n_past` on, or more; returns how many it still has."""
        ...

    def clear(self) -> None:
        """Forget all tokens of all sequences."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...
