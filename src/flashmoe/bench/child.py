"""One measurement in a process of its own: python -m flashmoe.bench.child, a Job as JSON in, the result as JSON out.

Alone in its process so that a memory limit, page faults and processor time are the measurement's and nobody else's.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.bench.spec import DEFAULT_POLICY, POOL, Job
from flashmoe.errors import FlashMoEError, ModelError


class Replay:
    """Feeds a job's tokens to an engine and takes the times. `phase` is told what comes: prefill, warmup, decode."""

    def __init__(
        self, job: Job, decode: Callable[[Sequence[int]], Any], phase: Callable[[str], None]
    ) -> None:
        self._job, self._decode, self._phase = job, decode, phase
        self._position = 0
        self._routing: Callable[[int, int], None] = lambda start, n: None

    def follow(self, routing: Callable[[int, int], None]) -> None:
        """Announce every evaluation, (first position, tokens), to `routing` before it runs."""
        self._routing = routing

    def run(self, step: int, logits: Callable[[], NDArray[np.float32]]) -> dict[str, Any]:
        """Evaluate everything, the prompt `step` tokens at a time."""
        job = self._job
        tokens = list(job.tokens)
        self._phase("prefill")
        started = time.perf_counter()
        for begin in range(0, job.n_prompt, step):
            self._evaluate(tokens[begin : min(begin + step, job.n_prompt)])
        prefill = time.perf_counter() - started
        counted = job.n_prompt + job.n_warmup
        self._phase("warmup")
        for token in tokens[job.n_prompt : counted]:
            self._evaluate([token])
        self._phase("decode")
        before, read_before = _faults(), _bytes_read()
        times = [self._evaluate([token]) for token in tokens[counted:]]
        faults, read = _faults() - before, _bytes_read() - read_before
        return {
            "prefill": {"tokens": job.n_prompt, "seconds": prefill, "tokens_per_s": job.n_prompt / prefill},
            "decode": {
                "tokens": len(times),
                "seconds": sum(times),
                "tokens_per_s": len(times) / sum(times),
                "mean_s": statistics.fmean(times),
                "median_s": statistics.median(times),
                "token_s": [round(t, 6) for t in times],
                "major_faults": faults,
                "bytes_read": read,
            },
            "logits_sha256": hashlib.sha256(logits().tobytes()).hexdigest(),
            "step": step,
        }

    def one_more(self) -> None:
        """Evaluate one more token."""
        self._evaluate([self._job.tokens[-1]])

    def _evaluate(self, tokens: Sequence[int]) -> float:
        self._routing(self._position, len(tokens))
        started = time.perf_counter()
        status = self._decode(tokens)
        seconds = time.perf_counter() - started
        if status:
            raise ModelError(f"llama.cpp failed to evaluate {len(tokens)} tokens (status {status})")
        self._position += len(tokens)
        return seconds


def measure(job: Job) -> dict[str, Any]:
    """Run a job. Raises FlashMoEError."""
    return _measure_pool(job) if job.engine == POOL else _measure_stock(job)


def _measure_pool(job: Job) -> dict[str, Any]:
    from flashmoe.bench.timeline import Timeline
    from flashmoe.cache.expert_cache import CacheStats
    from flashmoe.engines.llamacpp.library import open_library
    from flashmoe.runtime.load import load

    started = time.perf_counter()
    options: dict[str, Any] = {} if job.policy == DEFAULT_POLICY else {"policy": job.policy}
    model = load(
        job.model,
        ram=job.ram,
        cache=job.cache,
        n_ctx=job.n_ctx,
        n_ubatch=job.n_ubatch,
        threads=job.threads,
        prefetch=job.prefetch,
        layout=job.layout,
        library=open_library(Path(job.library)),
        save_cache=job.save_cache or False,
        verify=job.verify,
        **options,
    )
    loaded = time.perf_counter() - started
    time.sleep(job.idle)
    with model:
        model.cache.stats["warmup"] = CacheStats()  # a phase of its own: the report counts the other two

        def enter(phase: str) -> None:
            model.cache.phase = phase

        replay = Replay(job, model.engine.decode, enter)
        if job.trace:
            from flashmoe.bench.forced import ForcedRouting

            forced = ForcedRouting.for_model(model.catalog, job.trace, job.trace_start, len(job.tokens) + 1)
            model.engine.override_routing(forced)
            replay.follow(forced.at)
        model.cache.begin_sequence()
        result = replay.run(min(job.step, model.engine.n_ubatch), model.engine.logits)
        for name in ("prefill", "decode"):
            phase = getattr(model.telemetry, name)
            phase.tokens, phase.seconds = result[name]["tokens"], result[name]["seconds"]
        model.telemetry.decode_faults = result["decode"]["major_faults"]
        result["first_token_s"] = loaded + result["prefill"]["seconds"]
        model.telemetry.first_token_seconds = result["first_token_s"]
        result["report"] = model.stats
        if len(job.tokens) < job.n_ctx:
            model.cache.phase = "warmup"  # not counted
            result["timeline"] = Timeline(model.cache, model.catalog).record(replay.one_more)
    return {**result, "load_s": loaded, "peak_bytes": _peak()}


def _measure_stock(job: Job) -> dict[str, Any]:
    from flashmoe.engines.llamacpp.library import open_library
    from flashmoe.engines.llamacpp.stock import StockModel

    lib = open_library(Path(job.library))
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
    replay = Replay(job, context.decode, lambda phase: None)
    if routing:
        replay.follow(routing.forced.at)
    result = replay.run(job.step, context.logits)
    if routing and routing.error:
        raise routing.error
    result["first_token_s"] = loaded + result["prefill"]["seconds"]
    context.close()
    model.close()
    return {**result, "load_s": loaded, "peak_bytes": _peak()}


def _peak() -> int:
    from flashmoe.common.memory import status_bytes

    return status_bytes("VmHWM")


def _faults() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


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
            result = measure(Job.from_json(sys.stdin.read()))
        except FlashMoEError as error:
            result = {"error": str(error)}
        os.write(stdout, json.dumps(result).encode() + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
