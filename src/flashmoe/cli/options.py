"""Options that several verbs have, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashmoe.cli.logs import show_logs

Model = Annotated[
    str, typer.Argument(help="A GGUF file (or the first of a split set), hf:ORG/REPO[:FILE], or demo.")
]
Engine = Annotated[
    str, typer.Option("--engine", help="llama.cpp, or transformers for a safetensors checkpoint (a folder).")
]
Ram = Annotated[str | None, typer.Option("--ram", help="Memory for the whole process, e.g. 6GiB.")]
Cache = Annotated[
    str | None,
    typer.Option("--cache", help="Size of the expert pool instead: 25%, 2GiB or a number of slots."),
]
Vram = Annotated[
    str | None,
    typer.Option("--vram", help="Compute on the GPU, with experts there: 50% of them, or 16GiB in all."),
]
Policy = Annotated[str | None, typer.Option("--policy", help="Eviction policy: NAME or NAME:FILE.")]
Prefetch = Annotated[
    str, typer.Option("--prefetch", help="Predictor of the next experts: NAME, NAME:FILE, auto or none.")
]
Layout = Annotated[
    str,
    typer.Option("--layout", help="Of the weights: plain (the file's), repacked (fast kernels), or auto."),
]
NPredict = Annotated[int, typer.Option("-n", "--n-predict", help="Maximum tokens to generate; -1: no limit.")]
CtxSize = Annotated[
    int | None,
    typer.Option("-c", "--ctx-size", help="Context in tokens (the model's, as far as the budget allows)."),
]
CacheTypeK = Annotated[
    str, typer.Option("-ctk", "--cache-type-k", help="Type of the KV cache's keys: f16, q8_0, ...")
]
CacheTypeV = Annotated[str, typer.Option("-ctv", "--cache-type-v", help="Type of the KV cache's values.")]
Ubatch = Annotated[int, typer.Option("-ub", "--ubatch-size", help="Prompt tokens evaluated at once.")]
Threads = Annotated[int | None, typer.Option("-t", "--threads", help="Compute threads.")]
SaveCache = Annotated[
    bool,
    typer.Option(
        "--save-cache", help="Keep what the cache holds at the end; the next start goes on from it."
    ),
]
SaveCacheSize = Annotated[
    str,
    typer.Option("--save-cache-size", help="Conversations kept on the drive by --save-cache; 0 keeps none."),
]
Verify = Annotated[
    bool,
    typer.Option("--verify", help="Compare experts with their checksums (flashmoe verify) when first read."),
]
Trace = Annotated[Path | None, typer.Option("--trace", help="Record the routing to a .safetensors file.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the report to a file.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Nothing but the text.")]
Verbose = Annotated[
    bool,
    typer.Option("-v", "--verbose", callback=show_logs, help="Say on stderr what fell back or was retried."),
]
