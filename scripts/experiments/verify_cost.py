"""What `--verify` costs: the same with and without it, in turns.

    python scripts/experiments/verify_cost.py MODEL [--rounds 30] [--sessions 6] [--json FILE]

Reads alone: a block is 8 experts of every layer, drawn at random, a layer at a time and each layer waited for, as for a
token that misses all of them; in every round the same block is read plainly, and as the first reads of a session that
checks. Sessions: a model is loaded with a quarter of its experts in memory and decodes 96 random tokens; the time that
it waits for reads after 12 of them, mostly first reads, and after all.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import flashmoe
from flashmoe.storage.addresses import reserve_huge
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.checksums import FirstReads, needed_checksums
from flashmoe.storage.disk import tune
from flashmoe.storage.gguf import read_gguf
from flashmoe.storage.reader import ExpertReader, Read

MISSES = 8  # experts per layer
UNIT = 4096
COUNTED = (12, 96)  # tokens


def main(
    model: Path,
    rounds: Annotated[int, typer.Option()] = 30,
    sessions: Annotated[int, typer.Option()] = 6,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    catalog = ExpertCatalog.from_gguf(read_gguf(model))
    files, checksums = catalog.gguf.files, needed_checksums(catalog, {})
    readers = {"plain": ExpertReader(files), "checked": ExpertReader(files)}
    for reader in readers.values():
        tune(reader, catalog.read_bytes)
    weights = [p for layer in catalog.layers for p in layer.weights]
    stride = (max(p.nbytes for p in weights) // UNIT + 3) * UNIT
    most = MISSES * max(len(layer.weights) for layer in catalog.layers)
    memory, start = reserve_huge(most * stride)
    for reader in readers.values():
        reader.keep(memory)
    draw = np.random.default_rng(0)

    def block() -> list[list[Read]]:
        batches = []
        for layer in catalog.layers:
            experts = draw.choice(layer.n_experts, MISSES, replace=False).tolist()
            slices = [(p, p.offset + e * p.stride) for e in experts for p in layer.weights]
            batches.append(
                [
                    Read(p.file, offset, p.nbytes, start + i * stride + UNIT + offset % UNIT)
                    for i, (p, offset) in enumerate(slices)
                ]
            )
        return batches

    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds + 1):  # the first touches the memory and does not count
        batches = block()
        names = list(readers)[:: 1 if number % 2 else -1]
        for name in names:
            reader = readers[name]
            if name == "checked":
                reader.check(FirstReads(catalog, files, checksums))
            began = time.perf_counter()
            for batch in batches:
                reader.wait(reader.demand(batch))
            seconds[name].append(time.perf_counter() - began)
    for reader in readers.values():
        reader.close()
    costs = {"reads alone": cost(seconds["plain"][1:], seconds["checked"][1:])}
    stalls: dict[bool, list[list[float]]] = {False: [], True: []}
    for number in range(2 * sessions):
        verify = number % 4 in (1, 2)
        stalls[verify].append(stall(model, catalog, verify))
    for i, tokens in enumerate(COUNTED):
        costs[f"waiting, {tokens} tokens"] = cost([s[i] for s in stalls[False]], [s[i] for s in stalls[True]])
    for name, found in costs.items():
        spread = ", ".join(f"{c:+.1%}" for c in sorted(found))
        typer.echo(f"{name}: {statistics.median(found):+.1%} (rounds: {spread})")
    if json_file:
        json_file.write_text(json.dumps(costs, indent=1))


def cost(plain: list[float], checked: list[float]) -> list[float]:
    """What is added, as a share, in every round."""
    return [b / a - 1 for a, b in zip(plain, checked, strict=True)]


def stall(model: Path, catalog: ExpertCatalog, verify: bool) -> list[float]:
    """Seconds that a session has waited for reads after so many tokens."""
    tokens = np.random.default_rng(3).integers(0, 1000, COUNTED[-1] + 1).tolist()
    waited = []
    with flashmoe.load(
        model, cache="25%", n_ctx=128, layout="plain", prefetch="none", verify=verify
    ) as loaded:
        loaded.engine.decode(tokens[:1])
        loaded.cache.phase = "decode"
        for done, token in enumerate(tokens[1:], 1):
            loaded.engine.decode([token])
            if done in COUNTED:
                waited.append(loaded.cache.stats["decode"].stall_seconds)
    return waited


if __name__ == "__main__":
    typer.run(main)
