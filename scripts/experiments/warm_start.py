"""What `--save-cache` is worth: the first tokens of a session after a cold and after a warm start, in pairs.

    python scripts/experiments/warm_start.py MODEL TRACE [--ram 50%,25%] [--pairs 4] [--idle 0,3] [--json FILE]

A session of 16 + 112 tokens, routed by the first tokens of TRACE, leaves its cache. Then sessions of 16 + 32 tokens,
routed by later tokens of it (--start), are run cold and warm in turns, in a process each; --idle seconds pass between
loading and the prompt, as while a user types.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmoe.bench.baseline import drop_from_page_cache
from flashmoe.bench.forced import trace_tokens
from flashmoe.bench.runner import _run_child
from flashmoe.bench.spec import POOL, BenchError, Job, ram_sizes, split_list
from flashmoe.bench.tokens import vocabulary_size
from flashmoe.engines.llamacpp.tested import tested_library
from flashmoe.routing.files import read as read_trace
from flashmoe.storage.gguf import read_gguf

N_PROMPT, N_DECODE, N_BEFORE = 16, 32, 112


def run(job: Job, model: Path) -> dict[str, Any]:
    drop_from_page_cache([model])
    result = _run_child([sys.executable, "-m", "flashmoe.bench.child"], job.to_json(), 300)
    if "error" in result:
        raise BenchError(result["error"])
    return result


def figures(result: dict[str, Any]) -> dict[str, float]:
    cache = result["report"]["cache"]
    asked = cache["hits"] + cache["late_hits"] + cache["misses"]
    return {
        "first_token_seconds": result["load_seconds"] + result["prefill"]["seconds"],
        "prefill_s": result["prefill"]["seconds"],
        "tokens_per_second": result["decode"]["tokens_per_second"],
        "first_8_tokens_per_second": 8 / sum(result["decode"]["token_seconds"][:8]),
        "hit_rate": cache["hits"] / asked,
        "late": cache["late_hits"] / asked,
        "warm_mb": result["report"]["start"]["warm_bytes"] / 1e6,
    }


def main(
    model: Path,
    trace: Path,
    ram: Annotated[str, typer.Option()] = "50%,25%",
    pairs: Annotated[int, typer.Option()] = 4,
    idle: Annotated[str, typer.Option()] = "0,3",
    start: Annotated[int, typer.Option(help="First token of the measured sessions.")] = 128,
    prefetch: Annotated[str, typer.Option()] = "auto",
    threads: Annotated[int, typer.Option("-t")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    gguf, known = read_gguf(model), read_trace(str(trace))
    vocabulary = vocabulary_size(gguf)

    def job(first: int, n_decode: int) -> Job:
        tokens = trace_tokens(known, first, N_PROMPT + n_decode)
        return Job(
            engine=POOL, model=str(model), source=str(model), library=str(tested_library().path),
            tokens=[int(t) % vocabulary if t >= 0 else i for i, t in enumerate(tokens)],
            n_prompt=N_PROMPT, n_warmup=0, n_ctx=256, n_ubatch=256, step=256, threads=threads,
            prefetch=prefetch, trace=str(trace), trace_start=first,
        )  # fmt: skip

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        kept, used = Path(folder, "kept.safetensors"), Path(folder, "used.safetensors")
        for size in ram_sizes(ram, sum(file.stat().st_size for file in gguf.files)):
            run(replace(job(0, N_BEFORE), ram=size.ram, save_cache=str(kept)), model)
            for seconds in map(float, split_list(idle)):
                measured: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
                digests = set()
                for _ in range(pairs):
                    for kind, results in measured.items():
                        used.unlink(missing_ok=True)
                        if kind == "warm":
                            shutil.copy(kept, used)
                        one = replace(job(start, N_DECODE), ram=size.ram, idle=seconds, save_cache=str(used))
                        result = run(one, model)
                        digests.add(result["logits_sha256"])
                        results.append(figures(result))
                row = {"ram": size.text, "idle_seconds": seconds, "same_logits": len(digests) == 1}
                for kind, results in measured.items():
                    row[kind] = {key: statistics.median(r[key] for r in results) for key in results[0]}
                    row[f"{kind}_runs"] = results
                row["speedup"] = statistics.median(
                    w["tokens_per_second"] / c["tokens_per_second"]
                    for c, w in zip(measured["cold"], measured["warm"], strict=True)
                )
                rows.append(row)
                typer.echo(json.dumps({k: v for k, v in row.items() if not k.endswith("_runs")}))
    if json_file:
        json_file.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)
