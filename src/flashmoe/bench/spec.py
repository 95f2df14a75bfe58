"""What is asked for: a whole benchmark (`Plan`), and one measurement in a child process (`Job`)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from flashmoe.common.plugins import DEFAULT
from flashmoe.common.text import split_list
from flashmoe.common.units import parse_bytes
from flashmoe.errors import FlashMoEError, UsageError
from flashmoe.runtime.layout import AUTO, check_layout

#: What can be measured against. The pool itself is the engine "pool".
BASELINES = {
    "mmap": "llama.cpp, memory-mapped, the file's own layouts, under the same memory limit",
    "plain": "llama.cpp, all in RAM, the file's own layouts, no limit",
    "stock": "llama.cpp, all in RAM, as it comes (repacked layouts), no limit",
}
NO_BASELINE = "none"
POOL = "pool"


class BenchError(FlashMoEError):
    """A benchmark that cannot give figures worth reporting: a busy machine, a child that failed."""


@dataclass(frozen=True)
class Job:
    """One measurement: load, evaluate `tokens` one micro-batch and then one token at a time, report.

    The first `n_prompt` tokens are the prompt, the next `n_warmup` are decoded and not counted.
    """

    engine: str
    model: str  # the path to load, which may be a device
    source: str  # the model's own file
    library: str
    tokens: Sequence[int]
    n_prompt: int
    n_warmup: int
    n_ctx: int
    n_ubatch: int
    step: int  # prompt tokens per evaluation; the pool's own may be smaller
    threads: int
    module: str | None = None  # of kernels, in the library: for both sides
    repacks: bool = True  # whether these work with repacked layouts
    ram: int | None = None
    cache: str | None = None
    policy: str = DEFAULT
    prefetch: str = "auto"
    layout: str = AUTO
    approx: str = ""
    trace: str | None = None
    trace_start: int = 0
    save_cache: str | None = None
    verify: bool = False
    idle: float = 0.0  # seconds between loading and the prompt
    verbose: bool = False  # log records to stderr

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        return cls(**json.loads(text))


class Setting(NamedTuple):
    """One way to run the pool, as it was asked for."""

    policy: str
    prefetch: str
    layout: str
    approx: str = ""


@dataclass(frozen=True)
class Size:
    """One memory setting, as it was written: a budget for the process (`ram`) or a pool size (`cache`)."""

    text: str
    ram: int | None = None
    cache: str | None = None


@dataclass(frozen=True)
class Plan:
    """A benchmark: every size with every policy, prefetcher and layout, against every baseline, `pairs` times."""

    model: Path
    sizes: Sequence[Size]
    baselines: Sequence[str] = ("mmap",)
    policies: Sequence[str] = (DEFAULT,)
    prefetchers: Sequence[str] = ("auto",)
    layouts: Sequence[str] = (AUTO,)
    approximations: Sequence[str] = ("",)
    pairs: int = 5
    n_prompt: int = 16
    n_warmup: int = 32
    n_decode: int = 48
    n_ubatch: int = 512
    routing: str = "uniform"
    threads: int | None = None
    cold: bool = True
    allow_busy: bool = False
    seed: int = 0
    verify: bool = False
    timeout: float = 1800.0
    library: Path | None = None  # without the self-test; default: the one that is found and tested

    def __post_init__(self) -> None:
        for name in self.baselines:
            if name not in BASELINES:
                raise UsageError(f"--against {name!r}: choose from {', '.join(BASELINES)} or {NO_BASELINE}")
        from flashmoe.prefetch import create_all  # they take a moment to import
        from flashmoe.routing.approximation import parse

        for spec in self.prefetchers:
            create_all(spec)  # raises what is wrong with it
        for layout in self.layouts:
            check_layout(layout)
        for approx in self.approximations:
            parse(approx)
        if min(self.pairs, self.n_prompt, self.n_decode, self.n_ubatch) < 1 or self.n_warmup < 0:
            raise UsageError(
                "--pairs, --prompt-tokens, --tokens and -ub must be at least 1, --warmup not negative"
            )


def ram_sizes(text: str, file_bytes: int) -> list[Size]:
    """Budgets from "6GiB,50%,25%"; a share is one of the model's files. Raises UsageError."""
    sizes = []
    for item in split_list(text):
        share = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)%", item)
        nbytes = int(float(share[1]) / 100 * file_bytes) if share else parse_bytes(item)
        sizes.append(Size(item, ram=nbytes))
    return sizes


def cache_sizes(text: str) -> list[Size]:
    """Pool sizes from "50%,2GiB,300", each as `flashmoe run --cache` takes it."""
    return [Size(item, cache=item) for item in split_list(text)]
