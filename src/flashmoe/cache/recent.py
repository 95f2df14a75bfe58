"""The experts asked for lately while decoding."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

IDS = 4096  # kept of each layer: 512 tokens of 8 experts


class RecentRouting:
    """A ring of each layer's last requests. Noting them takes a microsecond; all else waits for a query."""

    def __init__(self, top_k: Sequence[int], n_experts: int) -> None:
        """top_k: experts that each layer gives to a token."""
        self.n_experts = n_experts
        n_layers = len(top_k)
        #: The ring [L, IDS] and where its next ids go [L]: compiled code notes requests as `add` does.
        self.ids = np.full((n_layers, IDS), -1, np.int16)
        self.at = np.zeros(n_layers, np.int64)
        self.top_k = top_k
        #: How many were noted in all.
        self.tokens = 0
        self._begun: deque[int] = deque(maxlen=IDS)  # tokens noted when a sequence began

    def begin_sequence(self) -> None:
        """A new prompt or conversation begins."""
        self._begun.append(self.tokens)

    def begin_step(self, tokens: int) -> None:
        """The layers are about to be asked for the experts of so many tokens."""
        self.tokens += tokens

    def add(self, layer: int, ids: NDArray[np.int32]) -> None:
        """A layer was asked for the experts `ids` [tokens * k] of a step."""
        at, n = int(self.at[layer]), len(ids)
        if at + n > IDS:
            at = 0
        if n <= IDS:
            self.ids[layer, at : at + n] = ids
            self.at[layer] = at + n

    def last(self) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
        """The ids [T, L, k] of the last tokens, oldest first, and at which of them a sequence begins [T].

        A layer that picks fewer experts than others has -1 in the place of some.
        """
        whole = IDS // max(self.top_k)
        ordered = np.full((len(self.ids), whole, max(self.top_k)), -1, np.int16)
        for layer, (at, k) in enumerate(zip(self.at.tolist(), self.top_k, strict=True)):
            rows = self.ids[layer, : IDS // k * k].reshape(-1, k)
            ordered[layer, :, :k] = np.roll(rows, -(at // k), axis=0)[-whole:]
        noted = int((ordered[:, :, 0] >= 0).sum(axis=1).min())
        begins = np.zeros(noted, np.bool_)
        first = self.tokens - noted
        begins[[n - first for n in self._begun if first <= n < self.tokens]] = True
        return np.ascontiguousarray(ordered[:, whole - noted :].swapaxes(0, 1)), begins
