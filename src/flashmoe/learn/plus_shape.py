"""The shape of the network of `flashmoe+`, whatever trains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Time scales of the moving averages, and those that the context follows (indices).
DECAYS = (0.5, 0.75, 0.9, 0.96, 0.985, 0.997)
CHANNEL_DECAYS = (0, 2, 4)
#: "Used within that many steps", and the weight of each in the score.
HORIZONS = (1, 2, 4, 8, 16, 32)
HORIZON_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 0.75, 0.5)
DROPOUT = 0.1  # of the hidden units of the context, while training


@dataclass(frozen=True)
class Sizes:
    """Numbers of an expert's vector, hidden units of the context, its numbers for each expert, and hidden units of the
    expert network."""

    r: int = 96
    h: int = 192
    k: int = 6
    m: int = 24

    @property
    def inputs(self) -> int:
        """Of the expert network."""
        return len(DECAYS) + 1 + self.k

    @property
    def constants(self) -> dict[str, Any]:
        """What a policy file says of its network."""
        return {
            "decays": list(DECAYS),
            "channel_decays": list(CHANNEL_DECAYS),
            "horizons": list(HORIZONS),
            "horizon_weights": list(HORIZON_WEIGHTS),
            "R": self.r, "H": self.h, "K": self.k, "M": self.m,
        }  # fmt: skip
