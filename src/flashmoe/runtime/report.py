"""The report of a run: figures for programs, and lines for the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flashmoe.common.units import format_bytes


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
