"""A llama_context: evaluates tokens and gives logits."""

from __future__ import annotations

import ctypes as C
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.engines.llamacpp.abi import CONSTANTS, Batch
from flashmoe.engines.llamacpp.allocations import counting
from flashmoe.engines.llamacpp.library import Library
from flashmoe.errors import ClosedError, ModelError

#: How the vectors of a text's tokens become one: llama.cpp's names and numbers.
POOLING = {name: CONSTANTS[f"LLAMA_POOLING_TYPE_{name.upper()}"] for name in ("none", "mean", "cls", "last")}
#: Types of a KV cache: llama.cpp's names, and their numbers in ggml.
CACHE_TYPES = {
    name: CONSTANTS[f"GGML_TYPE_{name.upper()}"]
    for name in ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
}
_PARTIAL_ONLY = CONSTANTS["LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY"]
_PADDING = 256  # llama.cpp rounds the cells of a KV cache up to a multiple of this


class Context:
    """Tokens over a loaded model, with a KV cache of `n_ctx` tokens. With `all_logits`, all their logits are kept.

    sequences: that the library's server evaluates in it together, each with such a KV cache; `decode` uses the first.
    """

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
        sequences: int = 1,
        pooling: str = "none",
        cache_types: tuple[str, str] = ("f16", "f16"),
    ) -> None:
        self._lib, self.n_ubatch, self._all_logits = lib, n_ubatch, all_logits
        params = lib.llama_context_default_params()
        # the library's server tries two tokens at once while it starts, and one of each sequence later
        self.n_batch = max(n_ubatch, sequences, 2)
        self._causal = _is_causal(lib, model)
        # without causal attention, tokens that come together must be evaluated together, else an assertion fails
        params.n_ctx, params.n_batch = n_ctx, self.n_batch
        params.n_ubatch = n_ubatch if self._causal else self.n_batch
        if sequences > 1:
            params.n_seq_max = sequences
            params.n_ctx = sequences * -(-n_ctx // _PADDING) * _PADDING
        params.type_k, params.type_v = (CACHE_TYPES[name] for name in cache_types)
        params.n_threads = params.n_threads_batch = threads
        # sizes the output buffer, vocabulary x outputs; the library wants one for each sequence
        every_token = all_logits or pooling != "none"
        params.n_outputs_max = max(self.n_batch if every_token else 1, sequences)
        params.pooling_type = POOLING[pooling]
        params.no_perf = True
        # a library with a backend for a GPU would send products there, which the pool is not on
        params.op_offload = params.offload_kqv = False
        if callback:
            params.cb_eval, params.cb_eval_user_data = callback
        lib.listen()
        self._pool: int | None = None
        own_threads = not lib.openmp
        self._pointer: int | None = self._make(model, params)
        self._memory = lib.llama_get_memory(self._pointer) if self._pointer else None
        if self._pointer and not self._memory and not every_token:  # then all are outputs
            lib.llama_free(self._pointer)
            params.n_outputs_max = self.n_batch
            self._pointer = self._make(model, params)
        if not self._pointer:
            reason = (lib.messages or ["no reason given"])[-1]
            raise ModelError(
                f"llama.cpp cannot make a context of {n_ctx} tokens ({reason}); try a smaller one (-c)"
            )
        self.n_ctx = int(lib.llama_n_ctx(self._pointer)) // sequences
        self._vocab = lib.llama_model_get_vocab(model)
        self.n_vocab = int(lib.llama_vocab_n_tokens(self._vocab))
        self.n_embd = int(lib.llama_model_n_embd_out(model))
        self._embedding = False
        self._window = lib.llama_model_n_swa(model)  # tokens that attention looks back; 0 for all
        self._recurrent = lib.llama_model_is_recurrent(model) or lib.llama_model_is_hybrid(model)
        #: Tokens evaluated so far by `decode`.
        self.past = 0
        self._sequence = (C.c_int32 * 1)(0)  # of every token
        self._batch = Batch(
            n_tokens=0,
            token=(C.c_int32 * n_ubatch)(),
            pos=(C.c_int32 * n_ubatch)(),
            n_seq_id=(C.c_int32 * n_ubatch)(*[1] * n_ubatch),
            seq_id=(C.POINTER(C.c_int32) * n_ubatch)(
                *[C.cast(self._sequence, C.POINTER(C.c_int32))] * n_ubatch
            ),
            logits=(C.c_int8 * n_ubatch)(),
        )
        if own_threads:
            try:
                self._attach_threads(threads)
            except BaseException:
                self.close()
                raise

    def _make(self, model: int, params: Any) -> int | None:
        with counting(self._lib) as sizes:
            pointer: int | None = self._lib.llama_init_from_model(model, params)
        #: Bytes of its tensors: state and compute buffers.
        self.tensor_bytes = sum(sizes)
        return pointer

    def _attach_threads(self, threads: int) -> None:
        """Without OpenMP, every cut of the graph would start threads anew: keep them."""
        params = self._lib.ggml_threadpool_params_default(threads)
        self._pool = self._lib.ggml_threadpool_new(C.byref(params))
        self._lib.llama_attach_threadpool(self._pointer, self._pool, self._pool)

    def reclaim(self) -> None:
        """The library's server has used it: end what it has set. It has freed the threads that it had attached."""
        self._lib.llama_set_embeddings(self.pointer, False)
        self._embedding = False
        self._lib.llama_detach_threadpool(self.pointer)
        if self._pool:
            self._lib.llama_attach_threadpool(self.pointer, self._pool, self._pool)

    @property
    def remembers(self) -> bool:
        """Whether tokens are evaluated after others; else (encoders, diffusion) all of a text at once."""
        return bool(self._memory) and self._causal

    @property
    def pointer(self) -> int:
        """The llama_context. Raises ClosedError where it has been freed."""
        if not self._pointer:
            raise ClosedError
        return self._pointer

    def decode(self, tokens: Sequence[int], *, embed: bool = False) -> int:
        """Evaluate up to n_ubatch tokens after those before; the library's status, 0 is success.

        `past` moves on in any case: after a failure call `rewind`. embed: for `embedding`.
        """
        if embed != self._embedding:
            self._lib.llama_set_embeddings(self.pointer, embed)
            self._embedding = embed
        n, batch, past, pointer = len(tokens), self._batch, self.past, self.pointer
        batch.n_tokens = n
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, past + i
            batch.logits[i] = int(self._all_logits or embed or i == n - 1)
        self.past += n
        return int(self._lib.llama_decode(pointer, batch))

    def rewind(self, n_past: int) -> None:
        """Forget tokens from position `n_past` on; all where the memory cannot be cut (Mamba)."""
        n_past = min(n_past, self.past) if self.remembers else 0
        assert self.pointer
        if n_past and self._lib.llama_memory_seq_rm(self._memory, 0, n_past, -1):
            # a cache of the window's size forgets what attention needs after a cut
            oldest = self._lib.llama_memory_seq_pos_min(self._memory, 0)
            if oldest <= max(0, n_past - self._window):
                self.past = n_past
                return
        if self._memory:
            self._lib.llama_memory_clear(self._memory, True)  # of all sequences
        self.past = 0

    def partial_state_bytes(self) -> int:
        """What the library keeps to come back to a place in a sequence, with the window's cells; 0 where it need not.

        It evaluates a token to find out, and forgets it.
        """
        if not (self._window or self._recurrent):
            return 0
        # Not causal: the library would use this graph again for the first token that is decoded, and the shapes of
        # expert tensors in it are not yet those of the pool
        self._lib.llama_set_causal_attn(self.pointer, False)
        self.decode([0])
        self._lib.llama_set_causal_attn(self.pointer, True)
        size = int(self._lib.llama_state_seq_get_size_ext(self.pointer, 0, _PARTIAL_ONLY))
        self.rewind(0)
        return size * max(1, min(self._window, self.n_ctx))

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        """Logits of the last evaluation, float32 [vocabulary]: of its last token, or with all_logits of any."""
        address = self._lib.llama_get_logits_ith(self.pointer, index)
        return np.ctypeslib.as_array(address, (self.n_vocab,)).copy()

    def embedding(self) -> NDArray[np.float32]:
        """What the pooling made of the tokens last evaluated with `embed`, float32 [n_embd]."""
        address = self._lib.llama_get_embeddings_seq(self.pointer, 0)
        return np.ctypeslib.as_array(address, (self.n_embd,)).copy()

    def close(self) -> None:
        if self._pointer:
            self._lib.llama_free(self._pointer)
            self._pointer = None
        if self._pool:
            self._lib.ggml_threadpool_free(self._pool)
            self._pool = None


def _is_causal(lib: Library, model: int) -> bool:
    """Whether a token's attention looks back only, as far as the model's file says."""

    def said(key: str) -> str:
        text = C.create_string_buffer(256)
        lib.llama_model_meta_val_str(model, key.encode(), text, len(text))
        return text.value.decode(errors="replace")

    return said(f"{said('general.architecture')}.attention.causal") != "false"
