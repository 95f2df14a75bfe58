"""Chooses tokens from logits with the library's own warpers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from flashmoe.engines.base import SamplingParams


class Sampler:
    """The chain top-k, top-p, min-p, temperature, then a seeded draw; or greedy. Has its own random numbers."""

    def __init__(self, logits: NDArray[np.float32], sampling: SamplingParams) -> None:
        """logits: float32 [vocabulary], where the engine puts those of its last evaluation."""
        from transformers.generation import logits_process as warpers

        self._logits = torch.from_numpy(logits)
        temperature, top_k, top_p, min_p = sampling.chain()
        self._greedy = temperature <= 0
        self._random = torch.Generator()
        if sampling.seed is not None:
            self._random.manual_seed(sampling.seed & 0xFFFFFFFF)
        else:
            self._random.seed()
        self._chain = warpers.LogitsProcessorList()
        if self._greedy:
            return
        if top_k > 0:
            self._chain.append(warpers.TopKLogitsWarper(top_k))
        if 0 < top_p < 1:
            self._chain.append(warpers.TopPLogitsWarper(top_p))
        if 0 < min_p < 1:
            self._chain.append(warpers.MinPLogitsWarper(min_p))
        self._chain.append(warpers.TemperatureLogitsWarper(float(temperature)))

    def sample(self) -> int:
        """Choose a token from the logits of the last evaluation."""
        if self._greedy:
            return int(self._logits.argmax())
        tokens = torch.zeros((1, 1), dtype=torch.long)  # the warpers do not look at them
        scores = self._chain(tokens, self._logits[None].clone())  # type: ignore[arg-type]
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._random))

    def close(self) -> None:
        """There is nothing to free."""
