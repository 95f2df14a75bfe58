"""What a prompt reads, how fast it is, and how many of a layer's experts are in when its router asks for them.

    python scripts/experiments/prompt_reads.py MODEL [--ram 930MiB | --cache 50%] [-ub TOKENS] [--tokens 512]
        [--prefetch none] [--idle 0]

One session, one prompt of random tokens, plain layouts, nothing resident before; --idle seconds pass between loading
and the prompt.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import flashmoe

GIB = 1 << 30


def main(
    model: Path,
    ram: Annotated[str | None, typer.Option()] = None,
    cache: Annotated[str | None, typer.Option()] = None,
    ubatch: Annotated[int | None, typer.Option("-ub")] = None,
    tokens: Annotated[int, typer.Option()] = 512,
    ctx: Annotated[int, typer.Option("-c")] = 1024,
    prefetch: Annotated[str, typer.Option()] = "none",
    idle: Annotated[float, typer.Option()] = 0,
) -> None:
    prompt = np.random.default_rng(0).integers(0, 2000, tokens).tolist()
    with flashmoe.load(
        model, ram=ram, cache=cache, n_ubatch=ubatch, n_ctx=ctx, layout="plain", prefetch=prefetch
    ) as loaded:
        time.sleep(idle)
        step = loaded.engine.n_ubatch
        began = time.perf_counter()
        for start in range(0, tokens, step):
            loaded.engine.decode(prompt[start : start + step])
        seconds = time.perf_counter() - began
        stats = loaded.cache.stats["prefill"]
        asked = stats.prefetch_hits + stats.late_hits + stats.misses
        typer.echo(
            f"-ub {step}, {loaded.cache.policy.residency.n_slots} slots: {stats.bytes_read / GIB:.2f} GiB read, "
            f"{tokens / seconds:.1f} tokens/s, {stats.stall_seconds:.1f} of {seconds:.1f} s waited; of {asked} absent "
            f"experts {stats.prefetch_hits} were in, {stats.late_hits} under way"
        )


if __name__ == "__main__":
    typer.run(main)
