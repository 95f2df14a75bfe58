"""The routing of a session's decoded tokens, kept for `flashmoe learn`: experts by layer, nothing of the text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.recent import RecentRouting

TAKEN = 256  # tokens that are taken over from the ring at once
MOST = 1 << 23  # ids of all layers that are kept in memory (16 MiB): 21,845 tokens of 48 layers, top-8


class History:
    """Takes over what `RecentRouting` notes, in blocks. Called where no layer is being served."""

    def __init__(self, recent: RecentRouting) -> None:
        self._recent = recent
        self._taken = recent.tokens
        self._blocks: list[tuple[NDArray[np.int16], NDArray[np.bool_]]] = []

    def look(self) -> None:
        """Take over what has come if it is a block."""
        if self._recent.tokens - self._taken >= TAKEN:
            self.take()

    def take(self) -> None:
        """Take over what has come since."""
        new = self._recent.tokens - self._taken
        self._taken += new
        ids, begins = self._recent.last()
        new = min(new, len(ids))
        if new:
            self._blocks.append((ids[-new:], begins[-new:]))
        while sum(ids.size for ids, _ in self._blocks) > MOST and len(self._blocks) > 1:
            del self._blocks[0]

    def routing(self) -> tuple[NDArray[np.int16], NDArray[np.int32]] | None:
        """Experts [T, L, k] of the tokens since the last call, oldest first, -1 for none, and the number of each one's
        sequence [T]; they are kept here no longer.

        None where nothing was decoded.
        """
        self.take()
        if not self._blocks:
            return None
        ids, begins = (np.concatenate(parts) for parts in zip(*self._blocks, strict=True))
        self._blocks.clear()
        return ids, np.cumsum(begins).astype(np.int32)
