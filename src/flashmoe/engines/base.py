"""What an engine offers to the rest of FlashMoE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy. Names and defaults are llama.cpp's."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None


class Engine(Protocol):
    """A loaded model that runs its experts through an ExpertCache."""

    n_ctx: int
    n_ubatch: int

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text` (a beginning-of-sequence token first, where the model has one)."""
        ...

    def piece(self, token: int) -> bytes:
        """The bytes that `token` stands for."""
        ...

    def is_end(self, token: int) -> bool:
        """Whether `token` ends the generation."""
        ...

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """`messages` ({"role", "content"}) in the model's own chat template. Raises ModelError without one."""
        ...

    def decode(self, tokens: Sequence[int]) -> None:
        """Evaluate at most `n_ubatch` tokens after those there. Raises ReadError, and leaves the context as it was."""
        ...

    def set_sampling(self, sampling: Sampling) -> None:
        """Use `sampling` from here on; restarts its random numbers."""
        ...

    def sample(self) -> int:
        """Choose a token from the last logits."""
        ...

    def clear(self) -> None:
        """Forget all tokens."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...
