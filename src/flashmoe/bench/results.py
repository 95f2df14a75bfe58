"""From the measurements of all pairs to the rows of a report: medians, spread, ratios, bounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashmoe.bench.quiet import Load
from flashmoe.bench.spec import Setting, Size
from flashmoe.runtime.layout import PACKED, PLAIN, REPACKED

#: Layouts of the weights -> baselines that must then agree with the pool to the last bit.
_SAME_KERNELS = {PLAIN: ("mmap", "plain"), REPACKED: ("stock",), PACKED: ("stock",)}


@dataclass(frozen=True)
class Round:
    """One pass: every setting of the pool and every baseline once, and what else ran on the machine meanwhile."""

    ours: dict[Setting, dict[str, Any]]
    theirs: dict[str, dict[str, Any]]
    load: Load


def make_row(
    size: Size,
    setting: Setting,
    baseline: str,
    trace: str | None,
    rounds: Sequence[Round],
) -> dict[str, Any]:
    """A row: a size, a setting of the pool, an baseline. The run's report is that of the median pair.

    Speeds are decode tokens per second; `ratio` is the median of the pairs' ratios; spreads are interquartile ranges.
    """
    ours = [r.ours[setting] for r in rounds]
    theirs = [r.theirs[baseline] for r in rounds if baseline in r.theirs]
    failed = next((their["error"] for their in theirs if "error" in their), None)
    speeds = [our["decode"]["tokens_per_second"] for our in ours]
    opposing = [] if failed else [their["decode"]["tokens_per_second"] for their in theirs]
    ratios = [our / their for our, their in zip(speeds, opposing, strict=False)]
    middle = sorted(range(len(ours)), key=speeds.__getitem__)[(len(ours) - 1) // 2]
    chosen = ours[middle]
    report = {key: value for key, value in chosen["report"].items() if key != "text"}
    same = None
    if not report["approximate"] and baseline in _SAME_KERNELS[report["layout"]] and theirs and not failed:
        same = all(
            our["logits_sha256"] == their["logits_sha256"] for our, their in zip(ours, theirs, strict=True)
        )
    return {
        **report,
        "budget_bytes": size.ram,
        "cache_size": size.cache,
        "size": size.text,
        "policy": setting.policy,
        "policy_used": report["policy"],
        "prefetch": setting.prefetch,
        "baseline": baseline,
        "trace": trace,
        "decode": {**report["decode"], "tokens_per_second": statistics.median(speeds)},
        "opponent_decode": {"tokens_per_second": statistics.median(opposing)} if opposing else None,
        "opponent_error": failed,
        "ratio": statistics.median(ratios) if ratios else None,
        "spread": {
            "decode": spread(speeds),
            "opponent_decode": spread(opposing),
            "ratio": spread(ratios),
        },
        "runs": {"decode": speeds, "opponent_decode": opposing, "ratio": ratios},
        "token_seconds": {
            "median": statistics.median(our["decode"]["median_seconds"] for our in ours),
            "mean": statistics.median(our["decode"]["mean_seconds"] for our in ours),
            "each": chosen["decode"]["token_seconds"],  # of the run whose report this is
        },
        "load_seconds": _sides(ours, theirs, lambda run: run["load_seconds"]),
        "first_token_seconds": _sides(ours, theirs, lambda run: run["first_token_seconds"]),
        "prefill_tokens_per_second": _sides(ours, theirs, lambda run: run["prefill"]["tokens_per_second"]),
        "read_bytes_per_token": _sides(
            ours, theirs, lambda run: run["decode"]["read_bytes"] / run["decode"]["tokens"]
        ),
        "major_faults": _sides(ours, theirs, lambda run: run["decode"]["major_faults"]),
        "peak_bytes": _sides(ours, theirs, lambda run: run["group_peak_bytes"] or run["peak_bytes"]),
        "limit_bytes": {
            "ours": chosen["limit_bytes"],
            "baseline": theirs[middle]["limit_bytes"] if theirs else None,
        },
        "bounds": bounds(report),
        "timeline": chosen.get("timeline"),
        "same_logits": same,
        "busy": any(r.load.busy for r in rounds),
        "others_cores": max(r.load.others for r in rounds),
    }


def bounds(report: dict[str, Any]) -> dict[str, float | None]:
    """Tokens per second that the drive and the processor allow at this hit rate, from the same run."""
    seconds = report["decode"]["tokens"] / report["decode"]["tokens_per_second"]
    computing = seconds - report["io"]["stall_seconds"]
    ceiling, per_token = report["io"]["ceiling_bytes_per_second"], report["io"]["read_bytes_per_token"]
    return {
        "ssd_tokens_per_second": ceiling / per_token if ceiling and per_token else None,
        "compute_tokens_per_second": report["decode"]["tokens"] / computing if computing > 0 else None,
    }


def spread(values: Sequence[float]) -> list[float] | None:
    """First and third quartile; None where there are no values."""
    if not values:
        return None
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def _sides(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], value: Any) -> dict[str, Any]:
    """The median of a figure for both sides; None where the baseline has failed."""
    good = [value(run) for run in theirs if "error" not in run]
    return {
        "ours": statistics.median(map(value, ours)),
        "baseline": statistics.median(good) if good else None,
    }
