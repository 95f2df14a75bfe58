"""Options of loading a model, shared by the command line, `flashmoe.load` and the opening of files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashmoe.common.units import parse_bytes
from flashmoe.engines.llamacpp.context import CACHE_TYPES
from flashmoe.engines.llamacpp.serving.options import ServerOptions
from flashmoe.errors import UsageError
from flashmoe.routing.approximation import parse as parse_approx
from flashmoe.runtime.layout import AUTO, REPACKED, check_layout

ENGINES = (LLAMACPP, TRANSFORMERS) = ("llama.cpp", "transformers")
AUTO_RAM = "auto"
_MOST = (1 << 31) - 1
_MOST_THREADS = 512  # GGML_MAX_N_THREADS
DEFAULT_SAVED = "4GiB"  # of conversations on the drive


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How to load a model, checked when it is made.

    engine: "llama.cpp", or "transformers": Hugging Face's own model, as `.model`, in BF16, F16 or F32.
    ram: memory for the whole process, for example "6GiB"; by default ("auto") a share of what is available, and less
        while other programs need memory.
    cache: sizes the expert pool directly instead: "25%" of the experts, "2GiB", or a number of slots ("300").
    vram: of the transformers engine: compute on the GPU, with a tier of experts there in front of those in RAM: "50%"
        of the experts, or a size of all that the model takes there ("16GiB"). Without it the CPU computes.
    policy: eviction policy, NAME or NAME:FILE (default: adaptive, or what is bundled with the demo model,
        or what `flashmoe learn` has made).
    prefetch: predictor of the next layer's experts: "gate", "table", "promoe:FILE", "moe-infinity", "finemoe", "none",
        or "auto": the first of gate and table that is worth asking on this text, and none where neither is.
    layout: of all weights. "plain": the file's; "repacked": those that llama.cpp's default chooses for this processor;
        "auto": repacked where that is faster. The results are llama.cpp's with the same layouts.
    n_ctx: context in tokens of one conversation (default: the model's, and less, down to 1024, where it would take more
        than a sixth of what the weights leave of the budget, or a third for 32768: slots are worth more).
    n_ubatch: most tokens evaluated at once while a prompt is read, fewer where the budget leaves no room for that many;
        the results are the engine's at the same value. By default so many that a prompt's token and a decoded one
        together read as few experts as possible (512 with the transformers engine).
    threads: compute threads (default: the cores that this process may use, fewer under a quota).
    all_logits: keep the logits of every token, not the last only.
    trace: record which experts every token is routed to, see `Model.recorder`.
    parallel: conversations that llama.cpp's server (`Model.server`) holds at once and evaluates together, each with
        `n_ctx` tokens of context; 0: up to four, as far as they take no more than a third of what the weights leave;
        None: one, and it is not served to others.
    cache_type_k, cache_type_v: types of the KV cache: f16, q8_0, ... (llama.cpp's names).
    cache_ram: memory for conversations that no slot of the server holds (default: a share with `parallel`, else none).
    server: what else the server is told (chat template, reasoning, projector, defaults of samplers).
    pooling: how `Model.embed` makes one vector of a text's tokens: "last", "mean", "cls", or "auto": as the file says.
        It costs memory: every token of a micro-batch then has logits. "none": no embeddings.
    save_cache: keep which experts are resident, and what the policy and the predictors have learned, when the model is
        closed, and go on from there at the next start: in the user's cache folder, or in a file. Off by default: with
        `table` the file holds the ids of tokens that were used. The conversations that the server's slots hold then
        are kept too, as tokens and states, in a folder beside it.
    save_cache_size: what conversations may take of the drive; 0 keeps none.
    approx: let the routing of decoded tokens be approximate, at a price that `flashmoe quality` measures:
        "cache:LAMBDA", "drop:F", both joined by "+", or a level, "1" to "3" (docs/approximate.md). Prompts stay exact.
        Off ("") by default.
    learn: keep what the policy learns, and a bounded history of the experts that were routed to, in the user's cache,
        and go on from it at the next start (see `flashmoe learn`): numbers about experts, no text and no tokens. Of
        the engine llama.cpp only; the command line does so unless told otherwise.
    verify: compare every slice of an expert with its checksum (`flashmoe.verify`) when it is first read; one that
        differs is a ReadError.

    Raises UsageError for values that no model can be loaded with.
    """

    engine: str = LLAMACPP
    ram: str | int | None = None
    cache: str | None = None
    vram: str | int | None = None
    policy: str | None = None
    prefetch: str = "auto"
    layout: str = AUTO
    n_ctx: int | None = None
    n_ubatch: int | None = None
    threads: int | None = None
    all_logits: bool = False
    trace: bool = False
    parallel: int | None = None
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    cache_ram: str | int | None = None
    server: ServerOptions | None = None
    pooling: str = "none"
    save_cache: bool | str | Path = False
    save_cache_size: str | int = DEFAULT_SAVED
    approx: str = ""
    learn: bool = False
    verify: bool = False

    def __post_init__(self) -> None:
        if self.ram is not None and self.cache is not None:
            raise UsageError("give either a budget (ram) or a pool size (cache), not both")
        for count in (self.n_ubatch, self.threads, self.n_ctx):
            if count is not None and not 1 <= count <= _MOST:
                raise UsageError(f"context, micro-batch and threads must be at least 1, and at most {_MOST}")
        if self.n_ctx == 1:
            raise UsageError("a context of 1 token has no room for an answer: give at least 2")
        if self.threads is not None and self.threads > _MOST_THREADS:
            raise UsageError(f"at most {_MOST_THREADS} threads can compute, not {self.threads}")
        if self.engine not in ENGINES:
            raise UsageError(f"unknown engine {self.engine!r}: choose from {', '.join(ENGINES)}")
        if self.vram is not None and self.engine != TRANSFORMERS:
            raise UsageError("--vram is for --engine transformers: llama.cpp computes on the CPU here")
        if self.engine == TRANSFORMERS:
            self._check_transformers()
        if self.parallel is not None and self.parallel < 0:
            raise UsageError("parallel must be at least 1, or 0 for as many as fit")
        if unknown := set(self.cache_types) - CACHE_TYPES.keys():
            raise UsageError(
                f"unknown type of a KV cache {unknown.pop()!r}: choose from {', '.join(CACHE_TYPES)}"
            )
        check_layout(self.layout)
        parse_approx(self.approx)
        for size in (self.cache_ram, self.save_cache_size):
            parse_bytes(size or 0)
        if self.ram is not None and self.ram != AUTO_RAM and not parse_bytes(self.ram):
            raise UsageError("a budget (ram) of 0 holds no model: give for example 6GiB")

    def _check_transformers(self) -> None:
        if self.layout == REPACKED:
            raise UsageError(
                "--layout repacked is llama.cpp's: transformers runs the file's weights as they are"
            )
        if self.pooling != "none":
            raise UsageError("the transformers engine makes no embeddings: use a GGUF")
        if parse_approx(self.approx) and self.vram is not None:
            raise UsageError("--approx knows the experts in RAM only: leave out --vram")
        if self.verify:
            raise UsageError(
                "--verify is for GGUF models; checkpoints on the hub have checksums of their own"
            )

    @property
    def cache_types(self) -> tuple[str, str]:
        """Of K and V."""
        return self.cache_type_k, self.cache_type_v

    @property
    def cache_ram_bytes(self) -> int | None:
        """Of conversations that no slot of the server holds; None: a share."""
        if self.cache_ram is not None:
            return parse_bytes(self.cache_ram)
        return 0 if self.parallel is None else None
