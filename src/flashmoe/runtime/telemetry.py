"""The counters of a run, and the report that is made of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from flashmoe.cache.policies import suggested
from flashmoe.cache.stats import CacheStats
from flashmoe.common.memory import status_bytes
from flashmoe.runtime.advice import advise
from flashmoe.runtime.report import Report
from flashmoe.simulate.what_if import WhatIf
from flashmoe.storage.disk import read_ceiling

if TYPE_CHECKING:
    from flashmoe.runtime.model import Model

STALL_BOUND = 0.4  # a run that waits for reads more than this share of its time is bound by the drive
FAULTS_PER_TOKEN = 4  # more major page faults per token: the system takes the weights' memory away


@dataclass
class Phase:
    """Tokens evaluated and the seconds they took, reads included."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Telemetry:
    """Accumulates over the life of a model; `report` gives the figures so far."""

    prefill: Phase = field(default_factory=Phase)
    decode: Phase = field(default_factory=Phase)
    decode_faults: int = 0
    load_seconds: float = 0.0
    first_token_seconds: float = 0.0  # from the start of loading to the first token made
    loaded: float = field(default_factory=time.perf_counter)

    def decode_rate(self, decode: CacheStats) -> float:
        """1e9 bytes per second that were read for decoding, on average over its whole time."""
        return decode.bytes_read / self.decode.seconds / 1e9 if self.decode.seconds else 0.0

    def token_made(self) -> None:
        """Take the time of the first one."""
        if not self.first_token_seconds:
            self.first_token_seconds = self.load_seconds + time.perf_counter() - self.loaded


def bound(stall_share: float, faults: int, tokens: int) -> str:
    """What held the decoding up: "memory" (the system pages the weights), "ssd", or "compute"."""
    if tokens and faults > FAULTS_PER_TOKEN * tokens:
        return "memory"
    return "ssd" if stall_share > STALL_BOUND else "compute"


def make_report(model: Model, text: str, pause: Callable[[], None]) -> Report:
    """The figures of a model so far; see `Model.report`. `cache` and `io` cover decoding; their prefill counterparts
    stand beside them."""
    telemetry, cache, catalog = model.telemetry, model.cache, model.catalog
    slots, experts = sum(cache.elastic.slots), catalog.total_experts
    warm = (cache.warm.experts, cache.warm.bytes) if cache.warm else (0, 0)
    what_if = WhatIf(cache.recent, cache.policy, pause)
    decode, prefill = cache.stats["decode"], cache.stats["prefill"]
    main, phase = (decode, telemetry.decode) if telemetry.decode.tokens else (prefill, telemetry.prefill)
    ahead = decode.prefetch_bytes + prefill.prefetch_bytes
    wasted = decode.wasted_bytes + prefill.wasted_bytes
    stall_share = main.stall_seconds / phase.seconds if phase.seconds else 0.0
    held_up = bound(stall_share, telemetry.decode_faults, telemetry.decode.tokens)
    ceiling = read_ceiling(cache.reader, catalog.read_bytes, reached=telemetry.decode_rate(decode))
    advice = advise(
        bound=held_up,
        tokens=telemetry.decode.tokens,
        seconds=telemetry.decode.seconds,
        stall_seconds=decode.stall_seconds,
        read_bytes=decode.bytes_read,
        ceiling=ceiling,
        slots=slots,
        experts=experts,
        expert_bytes=catalog.expert_bytes // experts,
        misses=what_if.larger,
        others=lambda: what_if.others([*model.alternatives, *suggested()]),
    )
    return Report(
        model=catalog.label,
        policy=cache.policy.name,
        prefetch=model.prefetcher.predictor.name if model.prefetcher else "",
        layout=model.layout,
        kernels=model.engine.kernels,
        kernels_hint=model.engine.kernels_hint,
        text=text,
        prefill={
            "tokens": telemetry.prefill.tokens,
            "tokens_per_second": telemetry.prefill.tokens_per_second,
        },
        decode={"tokens": telemetry.decode.tokens, "tokens_per_second": telemetry.decode.tokens_per_second},
        cache={
            "slots": slots,
            "total_experts": experts,
            "hits": decode.hits,
            "late_hits": decode.late_hits,
            "misses": decode.misses,
            "prefetch_hits": decode.prefetch_hits,
            "hit_rate": decode.hit_rate,
            "prefill_hits": prefill.hits,
            "prefill_misses": prefill.misses,
        },
        io={
            "read_bytes": decode.bytes + prefill.bytes + ahead + wasted + warm[1],
            "read_bytes_per_token": main.bytes_read / max(1, phase.tokens),
            "prefetch_bytes": ahead,
            "wasted_bytes": wasted,
            "read_bytes_per_second": main.bytes_read / phase.seconds if phase.seconds else 0.0,
            "ceiling_bytes_per_second": 1e9 * ceiling,
            "stall_share": stall_share,
            "stall_seconds": main.stall_seconds,
            "overhead_seconds_per_token": main.overhead_seconds / max(1, phase.tokens),
        },
        memory={
            "budget_bytes": model.budget_bytes,
            "peak_bytes": status_bytes("VmHWM"),
            "given_back_bytes": cache.elastic.unused_bytes,
            "most_given_back_bytes": cache.elastic.most_unused_bytes,
        },
        start={
            "load_seconds": telemetry.load_seconds,
            "first_token_seconds": telemetry.first_token_seconds,
            "warm_experts": warm[0],
            "warm_bytes": warm[1],
        },
        tiers=model.engine.tiers.figures() if model.engine.tiers else {},
        approximate=model.rewritten.as_dict() if model.rewritten else {},
        bound=held_up,
        advice=asdict(advice),
    )
