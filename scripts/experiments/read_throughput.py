"""How near demand reads come to the drive's own speed: experts that miss, against plain direct reads of the same sizes.

    python scripts/experiments/read_throughput.py MODEL [--rounds 7] [--json FILE]

In turns, one block of each per round: the expert cache is asked for 8 absent experts of a layer, layer after layer, and
waits for each layer; the same reads (files, offsets and lengths) by 1, 2, 4 and 8 threads with O_DIRECT and preadv, all
at once, and a layer at a time. Memory is of the same kind (huge pages, touched before). Beside the rate, the
processor time of a read.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from flashmoe.cache import sizing
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.policies import create
from flashmoe.cache.pool import SlotPool
from flashmoe.storage.addresses import reserve_huge
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.disk import read_ceiling, tune
from flashmoe.storage.gguf import read_gguf
from flashmoe.storage.reader import ExpertReader, Read

MISSES = 8  # experts per layer
THREADS = (1, 2, 4, 8)


class Raw:
    """Direct reads by threads into a buffer of its own."""

    def __init__(self, files: list[Path], longest: int, count: int) -> None:
        self._files = [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files]
        self._stride = (longest // 4096 + 3) * 4096
        self._memory, self._address = reserve_huge(count * self._stride)
        ctypes.memset(self._address, 0, count * self._stride)
        self._pools = {n: ThreadPoolExecutor(n) for n in THREADS}

    def read(self, threads: int, batches: list[list[Read]]) -> None:
        """Every batch in turn, the reads of one by all threads."""
        for batch in batches:
            for _ in self._pools[threads].map(self._one, range(len(batch)), batch):
                pass

    def _one(self, index: int, read: Read) -> None:
        start = read.offset // 4096 * 4096
        length = -(-(read.offset + read.nbytes - start) // 4096) * 4096
        buffer = (ctypes.c_char * length).from_address(self._address + index * self._stride)
        assert os.preadv(self._files[read.file], [buffer], start) >= read.nbytes


def main(
    model: Path,
    rounds: Annotated[int, typer.Option()] = 7,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    catalog = ExpertCatalog.from_gguf(read_gguf(model))
    reader = ExpertReader(catalog.gguf.files)
    ceiling = read_ceiling(reader, catalog.read_bytes, fresh=True)
    tune(reader, catalog.read_bytes)
    groups = max(catalog.groups) + 1
    slots = [len(catalog.layers) * MISSES] * groups
    pool = SlotPool(catalog, slots, reader)
    pool.prefault()
    policy = create("lru")
    policy.bind(sizing.residency_for(catalog, slots))
    cache = ExpertCache(pool, reader, policy)
    draw = np.random.default_rng(0)

    def absent() -> list[np.ndarray]:
        """Experts of every layer that are not resident."""
        away = [np.flatnonzero(policy.residency.slot_of[n] < 0) for n in range(len(catalog.layers))]
        return [draw.choice(experts, MISSES, replace=False).astype(np.int32) for experts in away]

    def reads(picked: list[np.ndarray]) -> list[list[Read]]:
        return [
            [read for e in experts for read in pool.reads(n, int(e), 0)] for n, experts in enumerate(picked)
        ]

    def demand(picked: list[np.ndarray]) -> None:
        for layer, experts in enumerate(picked):
            cache.ensure(layer, experts)

    for _ in range(2):  # memory is touched, code is compiled
        demand(absent())
    batches = reads(absent())
    nbytes = sum(read.nbytes for batch in batches for read in batch)
    longest = max(read.nbytes for batch in batches for read in batch)
    raw = Raw(list(catalog.gguf.files), longest, sum(len(batch) for batch in batches))
    ways: dict[str, Callable[[], Callable[[], None]]] = {
        "demand reads of the expert cache": lambda: partial(demand, absent())
    }

    def by_threads(n: int, *, at_once: bool) -> Callable[[], None]:
        layers = reads(absent())
        return partial(raw.read, n, [sum(layers, [])] if at_once else layers)

    for n in THREADS:
        ways[f"preadv, {n} threads, a layer at a time"] = partial(by_threads, n, at_once=False)
        ways[f"preadv, {n} threads, all at once"] = partial(by_threads, n, at_once=True)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    busy: dict[str, list[float]] = {name: [] for name in ways}  # milliseconds of a read
    n_reads = sum(len(batch) for batch in batches)
    for _ in range(rounds):
        for name, prepare in ways.items():
            run = prepare()
            began, used = time.perf_counter(), time.process_time()
            run()
            rates[name].append(nbytes / (time.perf_counter() - began) / 1e9)
            busy[name].append(1e3 * (time.process_time() - used) / n_reads)
    ours = rates["demand reads of the expert cache"]
    result: dict[str, Any] = {
        "ceiling_gb_per_s": ceiling,
        "block_bytes": nbytes,
        "read_bytes": catalog.read_bytes,
        "ways": {},
    }
    for name, measured in rates.items():
        ratio = statistics.median(a / b for a, b in zip(ours, measured, strict=True))
        result["ways"][name] = {
            "gb_per_s": statistics.median(measured),
            "runs": measured,
            "processor_ms_per_read": statistics.median(busy[name]),
            "ours_to_it": ratio,
        }
        typer.echo(
            f"{name:45} {statistics.median(measured):5.2f} GB/s   demand / it {ratio:.2f}"
            f"   {statistics.median(busy[name]):.2f} ms of a processor a read"
        )
    pool.close()
    reader.close()
    if json_file:
        json_file.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    typer.run(main)
