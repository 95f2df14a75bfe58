"""Chooses tokens from logits with llama.cpp's own samplers."""

from __future__ import annotations

from flashmoe.engines.base import SamplingParams
from flashmoe.engines.llamacpp.context import Context
from flashmoe.engines.llamacpp.library import Library

_RANDOM_SEED = 0xFFFFFFFF  # llama.cpp's own mark for "choose one"


class Sampler:
    """llama.cpp's chain top-k, top-p, min-p, temperature, then a seeded draw; or greedy. Has its own random numbers."""

    def __init__(self, lib: Library, context: Context, sampling: SamplingParams) -> None:
        self._lib, self._context = lib, context
        temperature, top_k, top_p, min_p = sampling.chain()
        self._chain: int | None = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        if temperature <= 0:
            links = [lib.llama_sampler_init_greedy()]
        else:
            links = [
                lib.llama_sampler_init_top_k(top_k),
                lib.llama_sampler_init_top_p(top_p, 1),
                lib.llama_sampler_init_min_p(min_p, 1),
                lib.llama_sampler_init_temp(temperature),
                lib.llama_sampler_init_dist(
                    _RANDOM_SEED if sampling.seed is None else sampling.seed & 0xFFFFFFFF
                ),
            ]
        for link in links:
            lib.llama_sampler_chain_add(self._chain, link)

    def sample(self) -> int:
        """Choose a token from the logits of the last evaluation."""
        return int(self._lib.llama_sampler_sample(self._chain, self._context.pointer, -1))

    def close(self) -> None:
        if self._chain:
            self._lib.llama_sampler_free(self._chain)
            self._chain = None
