"""One measurement in a process of its own: python -m flashmoe.bench.child, a Job as JSON in, the result as JSON out.

Alone in its process so that a memory limit, page faults and processor time are the measurement's alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.bench.spec import POOL, Job
from flashmoe.common.memory import major_faults, status_bytes
from flashmoe.common.plugins import DEFAULT
from flashmoe.common.signals import run_apart
from flashmoe.errors import FlashMoEError, ModelError

if TYPE_CHECKING:
    from flashmoe.engines.llamacpp.library import Library
    from flashmoe.runtime.model import Model

#: Evaluates tokens of the prompt, or one by one after it (decode); returns the seconds that it took.
Evaluate = Callable[[Sequence[int], bool], float]


class Replay:
    """Feeds a job's tokens to `evaluate` and adds up the times."""

    def __init__(self, job: Job, evaluate: Evaluate) -> None:
        self._job, self._run = job, evaluate
        self._position = 0
        self._routing: Callable[[int, int], None] = lambda start, n: None
        self._stopped = False

    def stop(self) -> None:
        """Let `run` fail soon, from any thread."""
        self._stopped = True

    def follow(self, routing: Callable[[int, int], None]) -> None:
        """Announce every evaluation, (first position, tokens), to `routing` before it runs."""
        self._routing = routing

    def run(
        self, step: int, logits: Callable[[], NDArray[np.float32]], warmed_up: Callable[[], None]
    ) -> dict[str, Any]:
        """Evaluate everything, the prompt `step` tokens at a time; `warmed_up` is called before what counts."""
        job = self._job
        tokens = list(job.tokens)
        started = time.perf_counter()
        for begin in range(0, job.n_prompt, step):
            self.evaluate(tokens[begin : min(begin + step, job.n_prompt)], decode=False)
        prefill = time.perf_counter() - started
        counted = job.n_prompt + job.n_warmup
        for token in tokens[job.n_prompt : counted]:
            self.evaluate([token], decode=True)
        warmed_up()
        before, read_before = major_faults(), _bytes_read()
        times = [self.evaluate([token], decode=True) for token in tokens[counted:]]
        faults, read = major_faults() - before, _bytes_read() - read_before
        return {
            "prefill": {
                "tokens": job.n_prompt,
                "seconds": prefill,
                "tokens_per_second": job.n_prompt / prefill,
            },
            "decode": {
                "tokens": len(times),
                "seconds": sum(times),
                "tokens_per_second": len(times) / sum(times),
                "mean_seconds": statistics.fmean(times),
                "median_seconds": statistics.median(times),
                "token_seconds": [round(t, 6) for t in times],
                "major_faults": faults,
                "read_bytes": read,
            },
            "logits_sha256": hashlib.sha256(logits().tobytes()).hexdigest(),
            "step": step,
        }

    def evaluate(self, tokens: Sequence[int], decode: bool) -> float:
        """Evaluate the tokens that come next; the seconds that it took."""
        if self._stopped:
            raise FlashMoEError("the measurement was interrupted")
        self._routing(self._position, len(tokens))
        seconds = self._run(tokens, decode)
        self._position += len(tokens)
        return seconds


def measure(job: Job) -> dict[str, Any]:
    """Run a job. Raises FlashMoEError."""
    return _measure_pool(job) if job.engine == POOL else _measure_stock(job)


def _measure_pool(job: Job) -> dict[str, Any]:
    from flashmoe.bench.timeline import Timeline
    from flashmoe.runtime.load import load

    started = time.perf_counter()
    options: dict[str, Any] = {} if job.policy == DEFAULT else {"policy": job.policy}
    model = load(
        job.model,
        ram=job.ram,
        cache=job.cache,
        n_ctx=job.n_ctx,
        n_ubatch=job.n_ubatch,
        threads=job.threads,
        prefetch=job.prefetch,
        layout=job.layout,
        library=_library(job),
        save_cache=job.save_cache or False,
        verify=job.verify,
        approx=job.approx,
        **options,
    )
    if not job.save_cache:
        fill(model)
    loaded = time.perf_counter() - started
    time.sleep(job.idle)
    with model:
        decoder = model.decoder
        replay = Replay(job, lambda tokens, decode: decoder.evaluate(tokens, decode=decode))
        if job.trace:
            from flashmoe.bench.forced import ForcedRouting

            forced = ForcedRouting.for_model(model.catalog, job.trace, job.trace_start, len(job.tokens) + 1)
            model.engine.override_routing(forced)
            replay.follow(forced.at)
        decoder.rewind()
        step = min(job.step, model.engine.n_ubatch)
        # in one thread, as the library's server does: handing each token over and back takes 0.07 ms
        result = run_apart(lambda: replay.run(step, decoder.logits, decoder.forget_decode), replay.stop)
        result["first_token_seconds"] = loaded + result["prefill"]["seconds"]
        decoder.telemetry.first_token_seconds = result["first_token_seconds"]
        result["report"] = model.stats
        if len(job.tokens) < job.n_ctx:
            last = job.tokens[-1:]
            timeline = Timeline(model.cache, model.catalog)
            result["timeline"] = timeline.record(lambda: replay.evaluate(last, decode=True))
    return {**result, "load_seconds": loaded, "peak_bytes": status_bytes("VmHWM")}


def fill(model: Model) -> None:
    """Have all experts resident where the pool holds them all: the baseline reads its whole file when it loads, too."""
    layers, cache = model.catalog.layers, model.cache
    if sum(cache.elastic.slots) < model.catalog.total_experts:
        return
    every = np.full((len(layers), model.catalog.n_experts), -1, np.int32)
    for row, layer in zip(every, layers, strict=True):
        row[: layer.n_experts] = np.arange(layer.n_experts)
    cache.warm_start(every)
    while cache.warm and cache.warm.running:
        time.sleep(0.01)


def _measure_stock(job: Job) -> dict[str, Any]:
    from flashmoe.engines.llamacpp.library import spin_as_openmp_does
    from flashmoe.engines.llamacpp.stock import StockModel

    spin_as_openmp_does()
    lib = _library(job)
    started = time.perf_counter()
    model = StockModel(lib, Path(job.model), mmap=True, repack=job.engine == "stock")
    routing = None
    if job.trace:
        from flashmoe.bench.forced import StockRouting

        routing = StockRouting(job.source, job.trace, job.trace_start, len(job.tokens), job.n_ubatch)
    context = model.context(
        n_ctx=job.n_ctx,
        n_ubatch=job.n_ubatch,
        threads=job.threads,
        callback=routing.callback if routing else None,
    )
    loaded = time.perf_counter() - started

    def evaluate(tokens: Sequence[int], decode: bool) -> float:
        began = time.perf_counter()
        status = context.decode(tokens)
        if status:
            raise ModelError(f"llama.cpp failed to evaluate {len(tokens)} tokens (status {status})")
        return time.perf_counter() - began

    replay = Replay(job, evaluate)
    if routing:
        replay.follow(routing.forced.at)
    result = replay.run(job.step, context.logits, lambda: None)
    if routing and routing.error:
        raise routing.error
    result["first_token_seconds"] = loaded + result["prefill"]["seconds"]
    context.close()
    model.close()
    return {**result, "load_seconds": loaded, "peak_bytes": status_bytes("VmHWM")}


def _library(job: Job) -> Library:
    """The same, with the same kernels, on both sides."""
    from flashmoe.engines.llamacpp.library import open_library

    return open_library(Path(job.library), Path(job.module) if job.module else None, repacks=job.repacks)


def _bytes_read() -> int:
    """Bytes this process has had fetched from a drive so far; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


@contextmanager
def _only_result_on_stdout() -> Iterator[int]:
    """Send what libraries print to stderr; yields a descriptor of the real standard output."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield kept
    finally:
        os.close(kept)


def main() -> int:
    with _only_result_on_stdout() as stdout:
        try:
            job = Job.from_json(sys.stdin.read())
            if job.verbose:
                logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
                logging.getLogger("flashmoe").setLevel(logging.INFO)
            result = measure(job)
        except FlashMoEError as error:
            result = {"error": str(error)}
        os.write(stdout, json.dumps(result).encode() + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
