"""Why a run is as slow as it is, and what would help most: a sentence with numbers, from the run itself.

The time of a token is what the engine computes plus what it waits for reads. The second part shrinks with the misses,
which are counted by replaying the run's own recent requests with a larger pool, and under other policies
(simulate/what_if.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flashmoe.common.units import format_bytes

LEAST_TOKENS = 32  # fewer decoded tokens say little
_STEP = 0.25  # of the memory in use: what one would think of adding
_CLEARLY = 1.03  # times the present speed: a policy that promises less is not worth a word


@dataclass(frozen=True)
class Advice:
    """`sentence` for people; tokens per second for programs, 0.0 where not known."""

    sentence: str
    more_ram_bytes: int = 0
    more_ram_tokens_per_second: float = 0.0
    faster_drive_tokens_per_second: float = 0.0  # twice as fast
    no_reads_tokens_per_second: float = 0.0  # every read hidden or saved
    policy: str = ""  # the one that would help most, where one clearly would
    policies_tokens_per_second: Mapping[str, float] = field(default_factory=dict)  # all that were replayed


def more_ram(used: int, missing: int) -> int:
    """Bytes worth adding to `used`: the next power of two above a quarter of it, at most the `missing` ones."""
    step = 1 << max(24, int(used * _STEP).bit_length())
    return min(step, missing)


def advise(
    *,
    bound: str,
    tokens: int,
    seconds: float,
    stall_seconds: float,
    read_bytes: float,
    ceiling: float,
    slots: int,
    experts: int,
    expert_bytes: int,
    misses: Callable[[float], float],
    others: Callable[[], Mapping[str, int]],
) -> Advice:
    """What to say of a run that decoded `tokens` tokens in `seconds`.

    read_bytes: read meanwhile; ceiling: of the drive, in 1e9 bytes per second, 0.0 where not known; slots, experts: of
    the whole pool and model; expert_bytes: of one expert; misses(c): of the last requests, with c times the slots;
    others(): of the same requests, under other policies.
    """
    if bound == "memory":
        return Advice(
            "memory-bound: the system takes the weights' memory away; lower --ram, or end other programs"
        )
    if not tokens:
        return Advice("no token was decoded, so nothing held them up")
    busy, stall = (seconds - stall_seconds) / tokens, stall_seconds / tokens
    rate = read_bytes / stall_seconds / 1e9 if stall_seconds else 0.0
    reached = f", {min(rate, ceiling):.1f} of {ceiling:.1f} GB/s reached" if ceiling and rate else ""
    start = f"{bound}-bound: {stall_seconds / seconds:.0%} of the time stalled{reached}"
    if tokens < LEAST_TOKENS:
        return Advice(f"{start}; {tokens} tokens are too few to say more")
    whole = 1 / busy
    if bound == "compute":
        return Advice(
            f"{start}; more memory would give at most {whole:.1f} tokens/s, a faster processor more",
            no_reads_tokens_per_second=whole,
        )
    faster = 1 / (busy + stall / 2)
    extra = more_ram(slots * expert_bytes, (experts - slots) * expert_bytes)
    now = misses(1.0)
    if not extra or not now:
        return Advice(
            f"{start}; a drive twice as fast would give about {faster:.1f} tokens/s",
            faster_drive_tokens_per_second=faster,
            no_reads_tokens_per_second=whole,
        )
    ram = 1 / (busy + stall * misses(1 + extra / (slots * expert_bytes)) / now)
    policies = {spec: 1 / (busy + stall * missed / now) for spec, missed in others().items()}
    best = max(policies, key=lambda spec: policies[spec], default="")
    if best and policies[best] * seconds < _CLEARLY * tokens:
        best = ""
    policy = f"policy {best.partition(':')[0]} {policies[best]:.1f}, " if best else ""
    return Advice(
        f"{start}; +{format_bytes(extra)} of RAM would give about {ram:.1f} tokens/s, {policy}"
        f"a drive twice as fast {faster:.1f}, all experts in memory {whole:.1f}",
        more_ram_bytes=extra,
        more_ram_tokens_per_second=ram,
        faster_drive_tokens_per_second=faster,
        no_reads_tokens_per_second=whole,
        policy=best,
        policies_tokens_per_second=policies,
    )
