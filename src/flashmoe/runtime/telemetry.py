"""What a run did and what held it up."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from flashmoe.common.memory import status_bytes
from flashmoe.common.units import format_bytes
from flashmoe.runtime.advice import advise

if TYPE_CHECKING:
    from flashmoe.cache.stats import CacheStats
    from flashmoe.routing.rewrite import Rewritten

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


@dataclass(frozen=True)
class Report:
    """The figures of a run. `as_dict` is the layout of `--json` (docs/reference/formats.md)."""

    model: str
    policy: str
    prefetch: str  # the predictor that is asked at present; "" for none
    layout: str  # of the weights: "plain", "repacked", or "packed": repacked in a pack file
    kernels: str  # that compute; "" where there is nothing to choose
    kernels_hint: str  # what better ones would be worth
    text: str
    prefill: dict[str, float]
    decode: dict[str, float]
    cache: dict[str, float]
    io: dict[str, float]
    memory: dict[str, int]
    start: dict[str, float]
    tiers: dict[str, float]  # of experts on a GPU; empty where there are none
    approximate: dict[str, Any]  # how far the routing differs from the model's; empty for an exact run
    bound: str
    advice: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as a user reads it."""
        p, d, c, io, m = self.prefill, self.decode, self.cache, self.io, self.memory
        drive = io["ceiling_bytes_per_second"] / 1e9
        ceiling = f" of the drive's {drive:.2f}" if drive else ""
        kept = "" if m["peak_bytes"] <= m["budget_bytes"] or not m["budget_bytes"] else " - OVER"
        budget = f" of {format_bytes(m['budget_bytes'])}{kept}" if m["budget_bytes"] else ""
        requests = c["hits"] + c["late_hits"] + c["misses"]
        ahead = (
            f" ({c['prefetch_hits'] / requests:.1%} prefetched, {c['late_hits'] / requests:.1%} more late)"
            if requests and self.prefetch
            else ""
        )
        back = self.start["warm_experts"]
        kept_from = f", {back} from the last session" if back else ""
        return [
            f"prefill {p['tokens']} tokens, {p['tokens_per_second']:.1f} tokens/s; "
            f"decode {d['tokens']} tokens, {d['tokens_per_second']:.1f} tokens/s",
            f"cache {c['slots']} of {c['total_experts']} experts ({self.policy}{kept_from}), "
            f"hit rate {c['hit_rate']:.1%}{ahead}; "
            f"{format_bytes(io['read_bytes_per_token'])} read per token",
            f"reads {io['read_bytes_per_second'] / 1e9:.2f} GB/s on average{ceiling}; "
            f"memory {format_bytes(m['peak_bytes'])} at most{budget}; weights {self.layout}"
            + (f", kernels {self.kernels}" if self.kernels else ""),
            *([approximately(self.approximate)] if self.approximate else []),
            *self._given_back(),
            *self._tiers(),
            self.advice["sentence"],
            *([self.kernels_hint] if self.kernels_hint else []),
        ]

    def _given_back(self) -> list[str]:
        now, most = self.memory["given_back_bytes"], self.memory["most_given_back_bytes"]
        if not most:
            return []
        return [
            f"the pool has given back up to {format_bytes(most)} of its memory, {format_bytes(now)} at present"
        ]

    def _tiers(self) -> list[str]:
        t = self.tiers
        if not t:
            return []
        requests = max(1, t["vram_hits"] + t["ram_hits"] + t["ssd_misses"])
        return [
            f"experts asked for: {t['vram_hits'] / requests:.1%} on the GPU ({t['vram_slots']:.0f} slots), "
            f"{t['ram_hits'] / requests:.1%} in RAM, {t['ssd_misses'] / requests:.1%} on the drive; "
            f"{t['copies']:.0f} copied at {t['pcie_bytes_per_second'] / 1e9:.1f} GB/s, "
            f"{t['computed_on_cpu']:.0f} computed by the CPU"
        ]


def approximately(figures: Mapping[str, Any]) -> str:
    """What `Rewritten.as_dict` says, in a line."""
    level = "" if figures["approx"] == figures["rule"] else f"level {figures['approx']}, "
    return (
        f"approximate ({level}{figures['rule']}): {figures['replaced_share']:.1%} of experts replaced, "
        f"{figures['dropped_share']:.1%} left out, {figures['mass_lost_share']:.1%} of the router's weight lost"
    )


def bound(stall_share: float, faults: int, tokens: int) -> str:
    """What held the decoding up: "memory" (the system pages the weights), "ssd", or "compute"."""
    if tokens and faults > FAULTS_PER_TOKEN * tokens:
        return "memory"
    return "ssd" if stall_share > STALL_BOUND else "compute"


def make_report(
    telemetry: Telemetry,
    stats: dict[str, CacheStats],
    *,
    model: str,
    policy: str,
    prefetch: str,
    layout: str,
    kernels: tuple[str, str],
    text: str,
    slots: int,
    experts: int,
    expert_bytes: int,
    misses: Callable[[float], float],
    others: Callable[[], Mapping[str, int]],
    budget: int,
    ceiling: float,
    tiers: dict[str, float],
    rewritten: Rewritten | None = None,
    warm: tuple[int, int] = (0, 0),
    given_back: tuple[int, int] = (0, 0),
) -> Report:
    """Put the counters together. `cache` and `io` cover decoding; their prefill counterparts stand beside them.

    kernels: those in use, and what better ones would be worth. tiers: see engines.base.Tiers.
    expert_bytes, misses, others: see runtime.advice.advise.
    warm: experts that a warm start brought back, and bytes that it read in the background. given_back: bytes of the
    pool that it does without, now and at most so far.
    """
    decode, prefill = stats["decode"], stats["prefill"]
    main, phase = (decode, telemetry.decode) if telemetry.decode.tokens else (prefill, telemetry.prefill)
    ahead = decode.prefetch_bytes + prefill.prefetch_bytes
    wasted = decode.wasted_bytes + prefill.wasted_bytes
    stall_share = main.stall_seconds / phase.seconds if phase.seconds else 0.0
    held_up = bound(stall_share, telemetry.decode_faults, telemetry.decode.tokens)
    advice = advise(
        bound=held_up,
        tokens=telemetry.decode.tokens,
        seconds=telemetry.decode.seconds,
        stall_seconds=decode.stall_seconds,
        read_bytes=decode.bytes_read,
        ceiling=ceiling,
        slots=slots,
        experts=experts,
        expert_bytes=expert_bytes,
        misses=misses,
        others=others,
    )
    return Report(
        model=model,
        policy=policy,
        prefetch=prefetch,
        layout=layout,
        kernels=kernels[0],
        kernels_hint=kernels[1],
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
            "budget_bytes": budget,
            "peak_bytes": status_bytes("VmHWM"),
            "given_back_bytes": given_back[0],
            "most_given_back_bytes": given_back[1],
        },
        start={
            "load_seconds": telemetry.load_seconds,
            "first_token_seconds": telemetry.first_token_seconds,
            "warm_experts": warm[0],
            "warm_bytes": warm[1],
        },
        tiers=tiers,
        approximate=rewritten.as_dict() if rewritten else {},
        bound=held_up,
        advice=asdict(advice),
    )
