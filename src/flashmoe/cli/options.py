"""Options that several commands have, declared once; and the groups of them that say how a model is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmoe.cli.logs import show_logs
from flashmoe.cli.report import JsonFile, no_model_there, nothing_else_on_stdout

if TYPE_CHECKING:
    from flashmoe.runtime.options import LoadOptions

MOST_TOKENS = (1 << 31) - 1  # that llama.cpp counts

Model = Annotated[
    str,
    typer.Argument(
        help="Path of a GGUF file (or the first of a split set), hf:ORG/REPO[:FILE or QUANT], or demo."
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        "--engine",
        help="Inference engine: llama.cpp, or transformers for a folder with a safetensors checkpoint.",
    ),
]
Ram = Annotated[
    str | None,
    typer.Option(
        "--ram",
        help="Memory budget of the whole process, e.g. 6GiB, or auto: a share of the available memory, and less while "
        "others need it (default: auto).",
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        "--cache",
        help="Size of the expert cache, instead of --ram: 25% of the experts, 2GiB or a number of slots.",
    ),
]
Vram = Annotated[
    str | None,
    typer.Option(
        "--vram",
        help="Compute on the GPU and cache experts there: 50% of the experts, or GPU memory in total, e.g. 16GiB.",
    ),
]
Policy = Annotated[
    str | None, typer.Option("--policy", help="Cache eviction policy: NAME, or NAME:FILE for a trained one.")
]
Prefetch = Annotated[
    str, typer.Option("--prefetch", help="Predictor for prefetching experts: NAME, NAME:FILE, auto or none.")
]
Layout = Annotated[
    str,
    typer.Option(
        "--layout",
        help="Layout of the weights: plain (as in the file), repacked (for faster kernels) or auto.",
    ),
]
NPredict = Annotated[
    int,
    typer.Option(
        "-n", "--n-predict", help="Maximum tokens to generate; -1 for no limit.", min=-1, max=MOST_TOKENS
    ),
]
CtxSize = Annotated[
    int | None,
    typer.Option(
        "-c",
        "--ctx-size",
        help="Context size in tokens (default: the model's, less where the memory budget is small).",
    ),
]
CacheTypeK = Annotated[
    str, typer.Option("-ctk", "--cache-type-k", help="Data type of the KV cache for K: f16, q8_0, ...")
]
CacheTypeV = Annotated[str, typer.Option("-ctv", "--cache-type-v", help="Data type of the KV cache for V.")]
_UBATCH_HELP = "Physical batch size: maximum prompt tokens evaluated together"


def _tokens_or_auto(text: str) -> int | None:
    try:
        return None if text == "auto" else int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number of tokens nor auto") from None


Ubatch = Annotated[
    int | None,
    typer.Option(
        "-ub",
        "--ubatch-size",
        metavar="TOKENS",
        parser=_tokens_or_auto,
        help=f"{_UBATCH_HELP} (default: auto, which weighs reads of prompts against slots).",
    ),
]
PairedUbatch = Annotated[int, typer.Option("-ub", "--ubatch-size", help=f"{_UBATCH_HELP}, of both programs.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "-t",
        "--threads",
        help="Number of threads for computation (default: the cores that this process may use).",
    ),
]
SaveCache = Annotated[
    bool,
    typer.Option(
        "--save-cache",
        help="Save the state of the expert cache and of conversations on exit, and restore it at the next start.",
    ),
]
SaveCacheSize = Annotated[
    str,
    typer.Option(
        "--save-cache-size",
        help="Maximum disk space for conversations that --save-cache saves; 0 saves none.",
    ),
]
Approx = Annotated[
    str,
    typer.Option(
        "--approx",
        help="Approximate routing of decoded tokens, lossy: cache:LAMBDA, drop:F, both joined by +, or a level from "
        "1 to 3; flashmoe quality shows the price (default: 0, exact).",
    ),
]
NoLearn = Annotated[
    bool,
    typer.Option(
        "--no-learn",
        help="Neither use nor keep what was learnt about this model's experts (see flashmoe learn).",
    ),
]
Parallel = Annotated[
    int,
    typer.Option(
        "-np",
        "--parallel",
        help="Number of requests to decode in parallel, each with its own context; 0 for up to 4.",
        min=0,
        max=64,
    ),
]
Pooling = Annotated[
    str,
    typer.Option(
        "--pooling", help="Pooling type for embeddings: last, mean, cls, none, or auto (the model's own)."
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify", help="Verify the checksum of each expert (see flashmoe verify) when it is first read."
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        "--trace", callback=no_model_there, help="Record the expert routing to a .safetensors file."
    ),
]
Json = Annotated[
    JsonFile | None,
    typer.Option(
        "--json",
        metavar="FILE",
        parser=JsonFile,
        callback=nothing_else_on_stdout,
        help="Write the report as JSON to a file, or to standard output with -.",
    ),
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print only the generated text.")]
Silent = Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing but errors.")]
NoProgress = Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress.")]


@dataclass(frozen=True)
class ComputeOptions:
    """How a model is evaluated, where a command loads it in several ways."""

    ubatch: PairedUbatch = 512
    threads: Threads = None
    verify: Verify = False


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded, in every command that generates text."""

    ram: Ram = None
    cache: Cache = None
    policy: Policy = None
    prefetch: Prefetch = "auto"
    layout: Layout = "auto"
    n_ctx: CtxSize = None
    n_ubatch: Ubatch = None
    threads: Threads = None
    cache_type_k: CacheTypeK = "f16"
    cache_type_v: CacheTypeV = "f16"
    save_cache: SaveCache = False
    save_cache_size: SaveCacheSize = "4GiB"
    approx: Approx = ""
    no_learn: NoLearn = False
    verify: Verify = False

    def load_options(self, **more: Any) -> LoadOptions:
        """As the Python API has it; `more`: what only one command has. Raises UsageError."""
        from flashmoe.runtime.options import LoadOptions  # it takes a moment to import

        given = asdict(self)
        learn = not given.pop("no_learn")
        return LoadOptions(learn=learn, **given, **more)


Verbose = Annotated[
    bool,
    typer.Option(
        "-v",
        "--verbose",
        callback=show_logs,
        help="Report fallbacks and retries, and llama.cpp's warnings, on standard error.",
    ),
]
