"""What other compute kernels are worth: a model with each of them in turns, in a process each.

    python scripts/experiments/kernels.py MODEL [MODULE ...] [--cache 100%] [--layout repacked] [--rounds 2]

The built-in kernels come first in each round; ratios are to them. A pool of all experts is filled by the prompt.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from flashmoe.bench.runner import _run_child
from flashmoe.bench.spec import POOL, BenchError, Job
from flashmoe.bench.tokens import make_tokens
from flashmoe.common.machine import cores
from flashmoe.engines.llamacpp.library import BUILT_IN, find_library, open_library
from flashmoe.storage.gguf import read_gguf


def main(
    model: Path,
    modules: Annotated[list[Path] | None, typer.Argument()] = None,
    cache: Annotated[str, typer.Option()] = "100%",
    layout: Annotated[str, typer.Option()] = "repacked",
    rounds: Annotated[int, typer.Option()] = 2,
    n_prompt: Annotated[int, typer.Option("--prompt-tokens")] = 1080,
    n_decode: Annotated[int, typer.Option("--tokens")] = 32,
) -> None:
    library = find_library()
    n_ctx = -(-(n_prompt + n_decode + 1) // 256) * 256
    job = Job(
        engine=POOL, model=str(model), source=str(model), library=str(library),
        tokens=make_tokens("uniform", n_prompt + n_decode, read_gguf(model), open_library(library), 0),
        n_prompt=n_prompt, n_warmup=0, n_ctx=n_ctx, n_ubatch=512, step=512, threads=cores(),
        cache=cache, layout=layout,
    )  # fmt: skip
    speeds: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for module in (None, *(modules or [])):
            name = str(module) if module else BUILT_IN
            done = _run_child(
                [sys.executable, "-m", "flashmoe.bench.child"],
                replace(job, module=str(module) if module else None).to_json(),
                600,
            )
            if "error" in done:
                raise BenchError(f"{name}: {done['error']}")
            speeds.setdefault(name, []).append(
                (done["decode"]["tokens_per_second"], done["prefill"]["tokens_per_second"])
            )
            typer.echo(f"{name}: decode {speeds[name][-1][0]:.2f}, prompt {speeds[name][-1][1]:.1f} tokens/s")
    for name, runs in speeds.items():
        ratios = [
            [mine[i] / own[i] for mine, own in zip(runs, speeds[BUILT_IN], strict=True)] for i in (0, 1)
        ]
        row = {"kernels": name, "runs": runs, "decode_ratio": statistics.median(ratios[0])}
        typer.echo(json.dumps({**row, "prompt_ratio": statistics.median(ratios[1])}))


if __name__ == "__main__":
    typer.run(main)
