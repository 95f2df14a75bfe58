"""Runs a Plan: pairs of measurements, interleaved A B A B, each in a child process, on a machine that is quiet."""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from flashmoe.bench import quiet
from flashmoe.bench.baseline import OpponentFiles, drop_from_page_cache, opponent_files
from flashmoe.bench.cgroup import memory_group
from flashmoe.bench.forced import trace_tokens
from flashmoe.bench.machine import describe
from flashmoe.bench.results import Round, make_row
from flashmoe.bench.spec import POOL, BenchError, Job, Plan, Setting, Size
from flashmoe.bench.tokens import ROUTINGS, make_tokens, vocabulary_size
from flashmoe.cache.policies import create
from flashmoe.cache.sizing import parse_cache
from flashmoe.common.children import module_command
from flashmoe.common.machine import cores
from flashmoe.common.plugins import DEFAULT
from flashmoe.common.signals import ended_by_signals
from flashmoe.errors import UsageError
from flashmoe.routing.approximation import parse
from flashmoe.routing.files import read as read_trace
from flashmoe.storage.catalog import ExpertCatalog
from flashmoe.storage.disk import read_ceiling
from flashmoe.storage.gguf import read_gguf
from flashmoe.storage.reader import ExpertReader

_log = logging.getLogger(__name__)

_ATTEMPTS = 3  # of a pair that something else disturbed
_CONTEXT_STEP = 256
_KILLED = -9

#: Called with what runs now, how many measurements are done, and of how many.
Progress = Callable[[str, int, int], None]


def run(plan: Plan, progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """Run a benchmark; the layout of `--json`. Raises BenchError (busy machine, failed child), and as loading does."""
    return _Runner(plan, progress).run()


class _Runner:
    def __init__(self, plan: Plan, progress: Progress) -> None:
        from flashmoe.engines.llamacpp.library import open_library
        from flashmoe.engines.llamacpp.tested import tested_library

        self._plan, self._progress = plan, progress
        self._lib = open_library(plan.library) if plan.library else tested_library()
        self._catalog = ExpertCatalog.from_gguf(read_gguf(plan.model))
        is_tokens = plan.routing in ROUTINGS or plan.routing.startswith("text:")
        self._trace = None if is_tokens else plan.routing
        if self._trace:
            read_trace(self._trace)  # fails here, before anything runs
            if any(map(parse, plan.approximations)):
                raise UsageError(
                    "--approx rewrites what the router says, and a trace is to be followed: give no trace"
                )
        for policy in set(plan.policies) - {DEFAULT}:
            create(policy)  # as well
        for size in plan.sizes:
            if size.cache is not None:
                parse_cache(size.cache, self._catalog, 1)
        self._settings = [
            Setting(*values)
            for values in product(plan.policies, plan.prefetchers, plan.layouts, plan.approximations)
        ]
        self._total = len(plan.sizes) * plan.pairs * (len(self._settings) + len(plan.baselines))
        self._done = 0
        self._job = self._template()
        self._unlimited = False
        self._ceilings: list[float] = []  # of the drive, 1e9 bytes per second

    def run(self) -> dict[str, Any]:
        plan, gguf = self._plan, self._catalog.gguf
        with ExitStack() as stack:
            stack.enter_context(ended_by_signals())
            files = OpponentFiles(gguf.files[0], gguf.files, None, "")
            if "mmap" in plan.baselines:
                files = stack.enter_context(opponent_files(gguf.files))
            rows = [row for size in plan.sizes for row in self._measure_size(size, files)]
        notes = [files.note] if files.note else []
        if self._unlimited:
            notes.append("no right to make a memory control group: nothing limited the memory of either side")
        if not plan.cold:
            notes.append(
                "the page cache was not dropped: pages cached before do not count against a memory limit"
            )
        if self._trace:
            notes.append(
                f"on both sides the experts are those of {Path(self._trace).name}, whatever the router says"
            )
        return {
            "machine": {
                **describe(gguf.files[0], self._lib.build.name, self._lib.kernels, self._job.threads),
                "ceiling_bytes_per_second": 1e9 * statistics.median(self._ceilings),
            },
            "model": {
                "path": str(gguf.files[0]),
                "architecture": gguf.architecture,
                "file_bytes": sum(path.stat().st_size for path in gguf.files),
                "dense_bytes": self._catalog.dense_bytes,
                "total_expert_bytes": self._catalog.expert_bytes,
                "layers": len(self._catalog.layers),
                "experts": self._catalog.n_experts,
                "top_k": self._catalog.top_k,
            },
            "settings": {
                "pairs": plan.pairs,
                "prompt_tokens": plan.n_prompt,
                "warmup_tokens": plan.n_warmup,
                "decode_tokens": plan.n_decode,
                "routing": plan.routing,
                "page_cache": "cold" if plan.cold else "warm",
                "seed": plan.seed,
                "verify": plan.verify,
            },
            "notes": notes,
            "rows": rows,
        }

    def _measure_drive(self) -> None:
        """Before every run of ours, because a drive may change from minute to minute.

        It is noted: the child's report has it, without spending time and memory on it.
        """
        self._progress("measuring the drive", self._done, self._total)
        with closing(ExpertReader(self._catalog.gguf.files)) as reader:
            self._ceilings.append(read_ceiling(reader, self._catalog.read_bytes, fresh=True))

    def _tokens(self, n: int) -> list[int]:
        """The tokens to evaluate; those of the trace, as far as it knows them, where the routing is one's."""
        plan, gguf = self._plan, self._catalog.gguf
        tokens = make_tokens(plan.routing, n, gguf, self._lib, plan.seed)
        if self._trace is None:
            return tokens
        known, vocabulary = trace_tokens(read_trace(self._trace), plan.seed, n), vocabulary_size(gguf)
        return [int(k) % vocabulary if k >= 0 else t for k, t in zip(known, tokens, strict=True)]

    def _template(self) -> Job:
        plan, gguf = self._plan, self._catalog.gguf
        n = plan.n_prompt + plan.n_warmup + plan.n_decode
        trained = gguf.arch_int("context_length", n)
        if n > trained:
            raise UsageError(f"{n} tokens are more than this model's context ({trained}): ask for fewer")
        n_ctx = min(trained, -(-(n + 1) // _CONTEXT_STEP) * _CONTEXT_STEP)  # one more, for its time line
        return Job(
            engine=POOL,
            model=str(gguf.files[0]),
            source=str(gguf.files[0]),
            library=str(self._lib.path),
            module=str(self._lib.module) if self._lib.module else None,
            repacks=self._lib.repacks,
            tokens=self._tokens(n),
            n_prompt=plan.n_prompt,
            n_warmup=plan.n_warmup,
            n_ctx=n_ctx,
            n_ubatch=min(plan.n_ubatch, n_ctx),
            step=min(plan.n_ubatch, n_ctx),
            threads=plan.threads or cores(),
            trace=self._trace,
            trace_start=plan.seed,
            verify=plan.verify,
            verbose=_log.isEnabledFor(logging.INFO),
        )

    def _measure_size(self, size: Size, files: OpponentFiles) -> list[dict[str, Any]]:
        rounds = [self._quiet_round(size, files) for _ in range(self._plan.pairs)]
        return [
            make_row(size, setting, baseline, self._trace, rounds)
            for setting in self._settings
            for baseline in self._plan.baselines or ("none",)
        ]

    def _quiet_round(self, size: Size, files: OpponentFiles) -> Round:
        """One of each, again where something else was running meanwhile. Raises BenchError when it does not stop."""
        if self._plan.allow_busy:
            return self._round(size, files)
        done = self._done
        load: quiet.Load | None = None
        for _ in range(_ATTEMPTS):
            self._done = done
            self._progress("waiting for a quiet machine", self._done, self._total)
            load = quiet.wait_until_quiet()
            if load is None:
                result = self._round(size, files)
                if not result.load.busy:
                    return result
                load = result.load
        raise BenchError(
            f"the machine is busy, the figures would mean nothing: {load} (at most {quiet.LIMIT:.2f}); "
            "stop what else runs, or measure all the same with --allow-busy"
        )

    def _round(self, size: Size, files: OpponentFiles) -> Round:
        ours: dict[Setting, dict[str, Any]] = {}
        theirs: dict[str, dict[str, Any]] = {}
        loads = []
        for setting in self._settings:
            job = replace(self._job, ram=size.ram, cache=size.cache, **setting._asdict())
            title = f"{size.text}: pool, {setting.policy}"
            self._measure_drive()
            result, load = self._measure(title, job, size.ram, self._catalog.gguf.files)
            if "error" in result:
                raise BenchError(f"{title}: {result['error']}")
            ours[setting] = result
            loads.append(load)
        first = next(iter(ours.values()))
        # a pool that was sized directly: the baseline gets the memory that its process took
        limit = size.ram or first["group_peak_bytes"] or first["peak_bytes"]
        for name in self._plan.baselines:
            mapped = name == "mmap"
            job = replace(
                self._job,
                engine=name,
                model=str(files.first if mapped else self._catalog.gguf.files[0]),
                step=first["step"],
            )
            paths = files.files if mapped else self._catalog.gguf.files
            theirs[name], load = self._measure(
                f"{size.text}: {name}", job, limit if mapped else None, tuple(paths)
            )
            loads.append(load)
        return Round(ours, theirs, max(loads, key=lambda seen: max(seen.others, seen.stolen)))

    def _measure(
        self, title: str, job: Job, limit: int | None, paths: Sequence[Path]
    ) -> tuple[dict[str, Any], quiet.Load]:
        """One child process; its result (with "error" where it failed) and what else ran meanwhile."""
        self._progress(title, self._done, self._total)
        if self._plan.cold:
            drop_from_page_cache([*paths, *self._catalog.gguf.files])
        command = module_command("flashmoe.bench.child")
        with ExitStack() as stack:
            group = memory_group(limit)
            if group:
                stack.enter_context(group)
                command = group.command(command)
            elif limit is not None:
                self._unlimited = True
            before = quiet.sample()
            result = _run_child(command, job.to_json(), self._plan.timeout)
            load = quiet.load_between(before, quiet.sample())
            usage = group.usage() if group else None
        result["limit_bytes"] = limit if group else None
        result["group_peak_bytes"] = usage.peak if usage else 0
        if usage and usage.oom_kills and result.get("error"):
            result["error"] = "killed: out of memory under the limit"
        self._done += 1
        self._progress(title, self._done, self._total)
        return result, load


def _run_child(command: list[str], job: str, timeout: float) -> dict[str, Any]:
    try:
        child = subprocess.run(command, input=job, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:.0f} s"}
    for line in child.stderr.splitlines():
        _log.info("%s", line)
    lines = child.stdout.strip().splitlines()
    if child.returncode == 0 and lines:
        result: dict[str, Any] = json.loads(lines[-1])
        return result
    if child.returncode == _KILLED:
        return {"error": "killed"}
    last = (child.stderr.strip().splitlines() or ["no message"])[-1]
    return {"error": f"failed with status {child.returncode} ({last})"}
