"""A llama_context: evaluates tokens, gives logits, samples."""

from __future__ import annotations

import ctypes as C
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.engines.base import Sampling
from flashmoe.engines.llamacpp import abi
from flashmoe.engines.llamacpp.library import Library
from flashmoe.errors import ModelError

_RANDOM_SEED = 0xFFFFFFFF  # llama.cpp's own mark for "choose one"


class Context:
    """One sequence of tokens over a loaded model. With `all_logits`, the logits of every token are kept."""

    def __init__(
        self,
        lib: Library,
        model: int,
        *,
        n_ctx: int,
        n_ubatch: int,
        threads: int,
        callback: tuple[int, int] | None = None,
        all_logits: bool = False,
    ) -> None:
        self._lib, self.n_ubatch, self._all_logits = lib, n_ubatch, all_logits
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_ubatch, n_ubatch
        params.n_threads = params.n_threads_batch = threads
        params.n_outputs_max = n_ubatch if all_logits else 1  # sizes the output buffer: vocabulary x outputs
        params.no_perf = True
        if callback:
            params.cb_eval, params.cb_eval_user_data = callback
        lib.messages.clear()
        self._pointer: int | None = lib.llama_init_from_model(model, params)
        if not self._pointer:
            reason = (lib.messages or ["no reason given"])[-1]
            raise ModelError(
                f"llama.cpp cannot make a context of {n_ctx} tokens ({reason}); try a smaller one (-c)"
            )
        self.n_ctx = int(lib.llama_n_ctx(self._pointer))
        self._memory = lib.llama_get_memory(self._pointer)
        self._vocab = lib.llama_model_get_vocab(model)
        self.n_vocab = int(lib.llama_vocab_n_tokens(self._vocab))
        self._pool = None if lib.openmp else self._attach_threads(threads)
        self._sampler: int | None = None
        self.n_past = 0
        one = (C.c_int32 * 1)(0)
        self._keep: list[Any] = [one]
        self._batch = abi.Batch(
            n_tokens=0,
            token=(C.c_int32 * n_ubatch)(),
            pos=(C.c_int32 * n_ubatch)(),
            n_seq_id=(C.c_int32 * n_ubatch)(*[1] * n_ubatch),
            seq_id=(C.POINTER(C.c_int32) * n_ubatch)(*[C.cast(one, C.POINTER(C.c_int32))] * n_ubatch),
            logits=(C.c_int8 * n_ubatch)(),
        )

    def _attach_threads(self, threads: int) -> int:
        """Without OpenMP, every cut of the graph would start threads anew: keep them."""
        params = self._lib.ggml_threadpool_params_default(threads)
        pool: int = self._lib.ggml_threadpool_new(C.byref(params))
        self._lib.llama_attach_threadpool(self._pointer, pool, pool)
        return pool

    def decode(self, tokens: Sequence[int]) -> int:
        """Evaluate up to n_ubatch tokens after those already there; the library's status, 0 is success.

        `n_past` moves on in any case: after a failure call `rewind`.
        """
        n, batch = len(tokens), self._batch
        batch.n_tokens = n
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, self.n_past + i
            batch.logits[i] = int(self._all_logits or i == n - 1)
        self.n_past += n
        return int(self._lib.llama_decode(self._pointer, batch))

    def rewind(self, n_past: int) -> None:
        """Forget the tokens from position `n_past` on; all of them where the model's memory cannot be cut (Mamba)."""
        if n_past and self._lib.llama_memory_seq_rm(self._memory, 0, n_past, -1):
            self.n_past = n_past
        else:
            self._lib.llama_memory_clear(self._memory, True)
            self.n_past = 0

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        """Logits of the last evaluation, float32 [vocabulary]: of its last token, or with all_logits of any."""
        address = self._lib.llama_get_logits_ith(self._pointer, index)
        return np.ctypeslib.as_array(address, (self.n_vocab,)).copy()

    def set_sampling(self, sampling: Sampling) -> None:
        """Build llama.cpp's sampler chain: top-k, top-p, min-p, temperature, then a seeded draw; or greedy."""
        lib = self._lib
        if self._sampler:
            lib.llama_sampler_free(self._sampler)
        self._sampler = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        if sampling.temperature <= 0:
            links = [lib.llama_sampler_init_greedy()]
        else:
            links = [
                lib.llama_sampler_init_top_k(sampling.top_k),
                lib.llama_sampler_init_top_p(sampling.top_p, 1),
                lib.llama_sampler_init_min_p(sampling.min_p, 1),
                lib.llama_sampler_init_temp(sampling.temperature),
                lib.llama_sampler_init_dist(
                    _RANDOM_SEED if sampling.seed is None else sampling.seed & 0xFFFFFFFF
                ),
            ]
        for link in links:
            lib.llama_sampler_chain_add(self._sampler, link)

    def sample(self) -> int:
        """Choose a token from the last logits (and tell the sampler that it was chosen)."""
        return int(self._lib.llama_sampler_sample(self._sampler, self._pointer, -1))

    def close(self) -> None:
        if self._sampler:
            self._lib.llama_sampler_free(self._sampler)
            self._sampler = None
        if self._pointer:
            self._lib.llama_free(self._pointer)
            self._pointer = None
        if self._pool:
            self._lib.ggml_threadpool_free(self._pool)
            self._pool = None
