"""The Transformers engine: the library's own model, its KV cache, and the pool under its experts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.pool import SlotPool
from flashmoe.common.signals import run_apart
from flashmoe.engines.base import SamplingParams
from flashmoe.engines.transformers.experts import IMPLEMENTATION, PooledExperts, register
from flashmoe.engines.transformers.front import Front
from flashmoe.engines.transformers.rewriting import RouteRewriter
from flashmoe.engines.transformers.routers import find_matrices, find_routers
from flashmoe.engines.transformers.routing import Routing, count_tokens
from flashmoe.engines.transformers.sampler import Sampler
from flashmoe.engines.transformers.slots import HostSlots, InRam, Residents
from flashmoe.engines.transformers.tiers import Tiers
from flashmoe.engines.transformers.tokens import open_tokenizer, token_bytes
from flashmoe.errors import FlashMoEError, ModelError, UsageError
from flashmoe.prefetch.base import Predictor
from flashmoe.prefetch.scheduler import Prefetcher
from flashmoe.routing.recorder import Recorder, RoutingObserver
from flashmoe.routing.rewrite import Rewriter
from flashmoe.routing.trace import DECODE, PREFILL
from flashmoe.storage.catalog import ExpertCatalog


class TransformersEngine:
    """Implements `engines.base.Engine`. Call `attach` before the first `decode`.

    `model` is the library's own, with its own `generate`: its forwards go through the pool too.
    """

    has_server = False
    no_text = ""
    kernels = kernels_hint = ""
    pooling, n_embd = "none", 0  # it makes no embeddings

    def __init__(
        self,
        model: Any,
        catalog: ExpertCatalog,
        experts: tuple[str, ...],
        folder: Path,
        *,
        n_ctx: int,
        n_ubatch: int,
        threads: int,
        all_logits: bool = False,
        front: Front | None = None,
    ) -> None:
        """model: with its dense weights. experts: names of its experts modules. n_ctx: tokens of context.

        all_logits: compute them for every token. front: the device that the model is on, and its tier of experts.
        """
        self.model = model
        self._catalog, self._experts, self._folder, self._all_logits = catalog, experts, folder, all_logits
        self.n_ctx, self.n_ubatch, self._threads = n_ctx, n_ubatch, threads
        self.n_vocab = int(model.get_output_embeddings().weight.shape[0])
        self._routing = Routing(catalog.top_k)
        self._tokenizer = open_tokenizer(folder)
        self._ends = _end_tokens(model, self._tokenizer)
        self._past = 0
        self._cache: Any = None
        self._kept = np.zeros((1, self.n_vocab), np.float32)
        self._last = np.zeros(self.n_vocab, np.float32)
        self._recorder: Recorder | None = None
        self._driven = False
        self._front = front
        self._device = front.device.place if front else torch.device("cpu")
        self.tiers: Tiers | None = None
        self._limits = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after, with_kwargs=True)

    def approximate(self, rewriter: Rewriter) -> None:
        matrices = find_matrices(self.model, self._experts)
        if not matrices or self._catalog.top_k == 1:
            raise UsageError(
                f"{self._catalog.label}: --approx does not know this model's routers: run it without"
            )
        slot_of = self._routing.cache.policy.residency.slot_of
        self._routing.rewriter = RouteRewriter(rewriter, slot_of, matrices)

    def attach(self, pool: SlotPool, slots: Sequence[int], cache: ExpertCache) -> None:
        register()
        exact = self._front is None or self._front.device.exact
        for layer, name in enumerate(self._experts):
            module = self.model.get_submodule(name)
            module.pooled_experts = PooledExperts(module, layer, self._routing, exact=exact)
            module.register_forward_pre_hook(self._see, with_kwargs=True)
        self.model.set_experts_implementation(IMPLEMENTATION)
        host = HostSlots(pool, slots, self._catalog)
        residents: Residents = InRam(cache, host)
        if self._front is not None:
            first = self.model.get_submodule(self._experts[0]).pooled_experts
            residents = self.tiers = self._front.open(pool, host, cache, self._catalog, first)
        self._routing.open(cache, residents)

    def record(self, recorder: RoutingObserver | None) -> None:
        self._routing.step.recorder = recorder
        self._recorder = recorder if isinstance(recorder, Recorder) else None

    def prefetch(self, prefetcher: Prefetcher) -> None:
        self._routing.step.prefetcher = prefetcher
        routers = find_routers(self.model, self._experts)
        if routers:
            prefetcher.use_routers(routers)

    def inform(self, followers: Sequence[EvictionPolicy | Predictor]) -> None:
        """See Engine; what routers say is not told here."""
        table = self.model.get_input_embeddings()

        def embed(tokens: Sequence[int]) -> NDArray[np.float32]:
            with torch.no_grad():
                found: torch.Tensor = table.weight[torch.tensor(tokens, device=table.weight.device)]
            return found.to("cpu", torch.float32).numpy()

        for follower in followers:
            follower.use_embeddings(embed)

    def override_routing(self, override: Callable[[int, NDArray[np.int32]], None]) -> None:
        self._routing.step.override = override

    def past(self) -> int:
        return self._past

    def decode(self, tokens: Sequence[int], *, embed: bool = False) -> None:
        before = self._past
        if before + len(tokens) > self.n_ctx:
            raise FlashMoEError(
                f"the context is full: {before + len(tokens)} tokens of {self.n_ctx}; use a larger one (-c)"
            )
        self._routing.stop = False
        try:
            run_apart(partial(self._forward, list(tokens)), self._routing.interrupt)
        except BaseException:
            run_apart(partial(self._undo, before, before + len(tokens)), lambda: None)
            raise

    def _forward(self, tokens: list[int]) -> None:
        wanted = {} if self._all_logits or not self._limits else {"logits_to_keep": 1}
        self._driven = True
        try:
            with torch.inference_mode():
                found = self.model(
                    torch.tensor([tokens], device=self._device),
                    past_key_values=self._cache,
                    use_cache=True,
                    **wanted,
                )
        finally:
            self._driven = False
        self._cache = found.past_key_values
        self._past += len(tokens)
        self._kept = found.logits[0].to("cpu", torch.float32).numpy()
        self._last[:] = self._kept[-1]

    def _undo(self, n_past: int, reached: int) -> None:
        """An evaluation has failed; some layers have gone as far as `reached` tokens."""
        self._past = reached
        self._rewind(n_past)

    def logits(self, index: int = -1) -> NDArray[np.float32]:
        """Logits of the last evaluation, float32 [vocabulary]: of its last token, or with all_logits of any."""
        return self._kept[index].copy()

    def embedding(self) -> NDArray[np.float32]:
        raise UsageError("the transformers engine makes no embeddings: use a GGUF")

    def sampler(self, sampling: SamplingParams) -> Sampler:
        return Sampler(self._last, sampling)

    def rewind(self, n_past: int) -> int:
        """Forget tokens from `n_past` on; all where a layer's memory cannot be cut (a sliding window, Mamba)."""
        return run_apart(partial(self._rewind, n_past), lambda: None)

    def _rewind(self, n_past: int) -> int:
        if n_past < self._past:
            cache = self._cache
            if n_past and cache is not None and _cut(cache, n_past):
                self._past = n_past
            else:
                self._cache, self._past = None, 0
        return self._past

    def tokenize(self, text: str, special: bool = False, begin: bool = True) -> list[int]:
        # the library reads control tokens that are written out unless it is told to split them
        found = self._tokens().encode(text, add_special_tokens=begin, split_special_tokens=not special)
        return [int(token) for token in found]

    def piece(self, token: int, special: bool = False) -> bytes:
        return token_bytes(self._tokens(), token, special)

    def is_end(self, token: int) -> bool:
        return token in self._ends

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        tokenizer = self._tokens()
        if not tokenizer.chat_template:
            raise ModelError(
                "this model has no chat template: use `flashmoe run` without --chat, with a plain prompt"
            )
        try:
            text: str = tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # templates raise what they like
            raise ModelError(f"the model's chat template does not take these messages ({error})") from None
        return text

    def enter_thread(self) -> None:
        torch.set_num_threads(self._threads)

    def close(self) -> None:
        """End the use of the pool; the model cannot be run any more."""
        self._routing.close()
        self._cache = None

    def _tokens(self) -> Any:
        if self._tokenizer is None:
            raise ModelError(f"{self._folder}: has no tokenizer; give the prompt as token ids")
        return self._tokenizer

    def _before(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, count = count_tokens(args, kwargs)
        if not self._driven:
            self._routing.stop = False
            self._routing.cache.phase = (
                "decode" if count == len(ids if ids is not None else kwargs["inputs_embeds"]) else "prefill"
            )
            if self._recorder is not None:
                self._recorder.drop_step()
        self._routing.begin(ids, count)

    def _after(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        self._routing.step.end()
        if self._recorder is not None and not self._driven:
            ids, count = count_tokens(args, kwargs)
            rows = len(ids if ids is not None else kwargs["inputs_embeds"])
            tokens = -1 if ids is None else ids.reshape(-1).cpu().numpy()
            self._recorder.end_step(tokens, DECODE if count == rows else PREFILL, 0)

    def _see(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._routing.see(args[0] if args else kwargs["hidden_states"])


def _cut(cache: Any, n: int) -> bool:
    """Keep the first `n` tokens; False where a layer does not keep all of them one by one."""
    from transformers.cache_utils import DynamicLayer

    if not all(type(layer) is DynamicLayer for layer in cache.layers):
        return False
    for layer in cache.layers:
        if layer.get_seq_length() > n:  # a forward that failed has not come to all
            layer.crop(n - layer.get_seq_length())
    return True


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    found = model.generation_config.eos_token_id
    if found is None and tokenizer is not None:
        found = tokenizer.eos_token_id
    return set(found) if isinstance(found, list) else set() if found is None else {found}
