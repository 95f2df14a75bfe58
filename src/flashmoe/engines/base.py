"""What an engine offers to the rest of FlashMoE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


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


class Engine(Protocol):
    """A loaded model that runs its experts through an ExpertCache. Several sequences of tokens, one at a time."""

    n_ctx: int  # tokens that a sequence can hold
    n_ubatch: int
    n_vocab: int
    sequences: int

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

    def past(self, sequence: int = 0) -> int:
        """Tokens in a sequence."""
        ...

    def decode(self, tokens: Sequence[int], sequence: int = 0) -> None:
        """Evaluate at most `n_ubatch` tokens after those of a sequence.

        Raises ReadError, or what `interrupt` was given, and leaves the sequence as it was.
        """
        ...

    def interrupt(self, error: BaseException) -> None:
        """From another thread: end the evaluation under way, which takes its tokens back and raises `error`."""
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
