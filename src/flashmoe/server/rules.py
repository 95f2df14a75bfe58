"""What may change a token's logit: OpenAI's penalties and biases."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


class Penalties:
    """logit -= count * frequency + (count > 0) * presence, counted over the tokens made, as OpenAI defines them."""

    def __init__(self, frequency: float, presence: float) -> None:
        self._frequency, self._presence = frequency, presence
        self._counts: dict[int, int] = {}

    def apply(self, logits: NDArray[np.float32]) -> None:
        for token, count in self._counts.items():
            logits[token] -= count * self._frequency + self._presence

    def accept(self, token: int) -> bool:
        self._counts[token] = self._counts.get(token, 0) + 1
        return True


class Bias:
    """logit += bias of a token."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._tokens = np.fromiter(bias.keys(), np.int64, len(bias))
        self._values = np.fromiter(bias.values(), np.float32, len(bias))

    def apply(self, logits: NDArray[np.float32]) -> None:
        logits[self._tokens] += self._values

    def accept(self, token: int) -> bool:
        return True
