"""What a report says held a run up, and what would help."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.runtime.advice import LEAST_TOKENS, advise, more_ram

RUN: dict[str, Any] = {
    "bound": "ssd", "tokens": 100, "seconds": 10.0, "stall_seconds": 6.0, "read_bytes": 12e9, "ceiling": 2.5,
    "slots": 256, "experts": 1024, "expert_bytes": 4 << 20, "misses": lambda factor: 64 - 16 * factor,
    "others": dict,
}  # fmt: skip


def test_ssd_bound() -> None:
    advice = advise(**RUN)
    assert advice.no_reads_tokens_per_second == pytest.approx(25)  # 40 ms of computing
    assert advice.faster_drive_tokens_per_second == pytest.approx(1 / 0.07)
    assert advice.more_ram_bytes == 512 << 20  # 128 slots: half as many again, of 48 misses 40 are left
    assert advice.more_ram_tokens_per_second == pytest.approx(1 / (0.04 + 0.06 * 40 / 48))
    assert advice.sentence == (
        "ssd-bound: 60% of the time stalled, 2.0 of 2.5 GB/s reached; +512 MiB of RAM would give about 11.1 tokens/s, "
        "a drive twice as fast 14.3, all experts in memory 25.0"
    )
    assert advice.policy == ""


@given(
    others=st.dictionaries(
        st.sampled_from(["lfru", "arc", "flashmoe+:a/file.safetensors"]), st.integers(0, 96)
    ),
    stalled=st.floats(0.41, 0.99),
)
def test_a_policy_is_named_if_it_would_clearly_help(others: dict[str, int], stalled: float) -> None:
    """Of a run that misses 48 requests, makes 10 tokens per second and reads for a share of the time."""
    advice = advise(**{**RUN, "stall_seconds": 10 * stalled, "others": lambda: others})
    assert advice.policies_tokens_per_second == pytest.approx(
        {spec: 10 / (1 - stalled + stalled * missed / 48) for spec, missed in others.items()}
    )
    fewest = min(others.values(), default=48)
    if 10 / (1 - stalled + stalled * fewest / 48) >= 10.31:
        assert others[advice.policy] == fewest
        speed = advice.policies_tokens_per_second[advice.policy]
        assert f"tokens/s, policy {advice.policy.split(':')[0]} {speed:.1f}, a drive" in advice.sentence
    elif 10 / (1 - stalled + stalled * fewest / 48) < 10.29:
        assert advice.policy == ""
        assert "policy" not in advice.sentence
    assert "/file" not in advice.sentence


def test_other_bounds() -> None:
    assert "lower --ram" in advise(**{**RUN, "bound": "memory"}).sentence
    hidden = advise(**{**RUN, "bound": "compute", "stall_seconds": 1.0})
    assert re.match(r"compute-bound: 10% .* more memory would give at most 11\.1 tokens/s", hidden.sentence)
    assert advise(**{**RUN, "tokens": LEAST_TOKENS - 1}).sentence.endswith(
        "31 tokens are too few to say more"
    )
    assert "no token" in advise(**{**RUN, "tokens": 0, "seconds": 0.0, "stall_seconds": 0.0}).sentence
    idle = advise(**{**RUN, "bound": "compute", "stall_seconds": 0.0, "read_bytes": 0.0})
    assert idle.sentence.startswith(
        "compute-bound: 0% of the time stalled; more memory would give at most 10.0"
    )
    assert "RAM" not in advise(**{**RUN, "slots": 1024}).sentence  # all experts have a slot
    assert "RAM" not in advise(**{**RUN, "misses": lambda _: 0}).sentence  # nothing was asked for twice


def test_more_ram_is_a_round_size() -> None:
    gib = 1 << 30
    assert more_ram(gib, 100 * gib) == gib // 2
    assert more_ram(7 * gib, 100 * gib) == 2 * gib
    assert more_ram(7 * gib, gib) == gib
