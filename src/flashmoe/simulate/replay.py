"""Hit rates of policies over a trace, at several capacities."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flashmoe.cache.maps import Embed
from flashmoe.cache.policies import without_file
from flashmoe.cache.policies.base import EvictionPolicy, Replay
from flashmoe.cache.policies.default import create_for
from flashmoe.cache.residency import make_residency
from flashmoe.common.text import split_list
from flashmoe.errors import FlashMoEError, UsageError
from flashmoe.routing.trace import RoutingTrace
from flashmoe.simulate.partition import pool_for
from flashmoe.simulate.told import replay_told


@dataclass(frozen=True)
class Row:
    """Result of one policy at one capacity."""

    policy: str
    partition: str
    capacity: float  # share of all experts that have a slot
    requests: int  # distinct experts per layer and step
    hits: int
    hit_rate: float
    gap_closed: float | None  # (hit rate - LRU) / (Belady - LRU), None where these are equal
    seconds: float  # of the replay, compilation left out


def parse_policies(text: str) -> list[str]:
    """Specs of a comma-separated list; "all" stands for every policy that needs no file."""
    specs: list[str] = []
    for spec in split_list(text):
        specs += without_file() if spec == "all" else [spec]
    if not specs:
        raise UsageError(
            "no policy given: use --policy all, or names such as lru,flashmoe+:policy.safetensors"
        )
    return list(dict.fromkeys(specs))


def parse_capacities(text: str, total: int) -> list[int]:
    """Slots for "12.5%,0.25,416" out of `total` experts: a percentage, a share below 1, or a number of
    slots."""
    slots = []
    for part in split_list(text):
        try:
            value = float(part.rstrip("%"))
        except ValueError:
            raise UsageError(f"cannot read capacity {part!r}: give 25%, 0.25 or a number of slots") from None
        n = value / 100 * total if part.endswith("%") else value * total if 0 < value < 1 else value
        if not 0 < n < total + 1 or not 1 <= round(n) <= total:  # the former also of what is no number
            raise UsageError(f"capacity {part!r} is not within 1 slot and 100% ({total} experts)")
        slots.append(round(n))
    if not slots:
        raise UsageError("no capacity given: for example --capacity 12.5%,25%,50%")
    return slots


def replay(
    trace: RoutingTrace,
    policy: EvictionPolicy,
    slots: int,
    partition: str = "per-layer",
    per_sequence: bool = False,
    guide: RoutingTrace | None = None,
    want_bits: bool = False,
) -> Replay:
    """One policy over one trace from a cold start (a cold start for each sequence with `per_sequence`)."""
    policy.bind(pool_for(trace, slots, partition, guide))
    if policy.needs_ranking:
        return replay_told(trace, policy, per_sequence, want_bits)
    return policy.replay(trace.expert_ids, trace.steps(), trace.starts(cold=per_sequence), want_bits)


def simulate(
    trace: RoutingTrace,
    policies: Sequence[str] = ("lru", "belady"),
    slots: Sequence[int] | None = None,
    partition: str = "per-layer",
    per_sequence: bool = False,
    guide: RoutingTrace | None = None,
    progress: Callable[[str, int], None] | None = None,
    embed: Embed | None = None,
) -> list[Row]:
    """Replay a trace through policies (specs NAME or NAME:FILE, or "default") at capacities in slots (default 12.5, 25,
    50 %).

    LRU and Belady run in any case: the gap is measured between them. embed: the model's embeddings, for policies that
    follow them. Raises UsageError, PolicyError,
    TraceError."""
    total = trace.n_layers * trace.num_experts
    sizes = list(slots) if slots is not None else parse_capacities("12.5%,25%,50%", total)
    made = {
        spec: create_for(spec, trace.model, trace.n_layers, trace.num_experts)
        for spec in dict.fromkeys([*policies, "lru", "belady"])
    }
    for policy in made.values():
        if embed is not None:
            policy.use_embeddings(embed)
    rows = []
    for size in sizes:
        results: dict[str, tuple[Replay, float]] = {}
        for spec, policy in made.items():
            if progress:
                progress(spec, size)
            compile_kernels(policy, trace)
            started = time.perf_counter()
            try:
                results[spec] = replay(trace, policy, size, partition, per_sequence, guide), 0.0
            except FlashMoEError as error:
                raise type(error)(f"{spec}: {error}") from None
            results[spec] = results[spec][0], time.perf_counter() - started
        low, high = (int(results[name][0].hits.sum()) for name in ("lru", "belady"))
        for spec in policies:
            result, seconds = results[spec]
            requests, hits = int(result.requests.sum()), int(result.hits.sum())
            rows.append(
                Row(
                    policy=spec,
                    partition=partition,
                    capacity=size / total,
                    requests=requests,
                    hits=hits,
                    hit_rate=hits / max(1, requests),
                    gap_closed=(hits - low) / (high - low) if high > low else None,
                    seconds=seconds,
                )
            )
    return rows


def compile_kernels(policy: EvictionPolicy, trace: RoutingTrace) -> None:
    """Let numba compile (or fetch from disk) what a replay needs, so that its time is the replay's alone."""
    quota = np.full(trace.n_layers, trace.top_k, np.int32)
    policy.bind(make_residency(trace.n_layers, trace.num_experts, quota))
    policy.replay(trace.expert_ids[:1])
