"""The policy that learns as it goes: safe at its start, better than the moving average on real routing."""

from __future__ import annotations

import numpy as np
import pytest

from flashmoe.cache.policies import create, online
from flashmoe.cache.policies.online import Online, inputs
from flashmoe.errors import PolicyError
from flashmoe.routing.trace import RoutingTrace
from flashmoe.simulate.replay import replay
from tests.simulate.traces import VALIDATION, made_up, real


def test_is_the_moving_average_until_it_has_learnt() -> None:
    """Weights are zero until AHEAD + BATCH steps are known."""
    trace = made_up(online.AHEAD + online.BATCH)
    hits = [replay(trace, create(name), 12).hits for name in ("lfu-aged", "online")]
    np.testing.assert_array_equal(*hits)


def test_learns_which_expert_follows() -> None:
    """Experts that come in a fixed order: an average knows nothing of it, some hundred steps teach it."""
    rng = np.random.default_rng(0)
    start = rng.integers(0, 4, 150) * 4  # four songs of four notes, in any order
    notes = (start[:, None] + np.arange(4)).ravel()
    trace = RoutingTrace(notes.astype(np.int16).reshape(-1, 1, 1), 16)
    rates = {name: replay(trace, create(name), 6).hits[300:].mean() for name in ("lfu-aged", "online")}
    assert rates["online"] > rates["lfu-aged"] + 0.05


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
def test_closes_more_of_the_gap_on_real_routing(share: float) -> None:
    trace = real(VALIDATION).rows(np.arange(3000))
    slots = round(share * 26 * 64)
    lru, average, learnt, best = (
        replay(trace, create(name), slots).hit_rate for name in ("lru", "lfu-aged", "online", "belady")
    )
    assert (learnt - lru) / (best - lru) > (average - lru) / (best - lru) + 0.03


def test_many_experts_at_once_and_other_partitions() -> None:
    """More experts than one request counts, requests of layers that skip tokens, and one pool for all."""
    rng = np.random.default_rng(1)
    ids = np.sort(rng.random((200, 3, 64)).argsort(axis=2)[:, :, :40].astype(np.int16), axis=2)
    ids[rng.random((200, 3)) < 0.1] = -1
    trace = RoutingTrace(ids, 64)
    for partition in ("per-layer", "global"):
        policy = Online()
        assert 0 < replay(trace, policy, 130, partition).hit_rate < 1
        assert np.isfinite(policy.state()["weight"]).all()


def test_goes_on_from_saved_state() -> None:
    trace = made_up(400)
    whole, halves = Online(), Online()
    replay(trace, whole, 12)
    replay(trace.rows(np.arange(200)), halves, 12)
    saved, residency = halves.state(), halves.residency
    again = Online()
    again.bind(residency)
    again.load_state(saved)
    again.replay(trace.expert_ids[200:], starts=np.zeros(200, np.uint8))
    np.testing.assert_array_equal(again.state()["weight"], whole.state()["weight"])
    saved["used"][0, 0, 0] = 16
    with pytest.raises(PolicyError, match="saved state"):
        again.load_state(saved)


@pytest.mark.parametrize(
    ("layers", "experts", "expected"),
    [
        (26, 64, (2, 3)),
        (1, 64, (2, 0)),
        (48, 128, (2, 3)),
        (58, 256, (1, 1)),
        (61, 384, (1, 0)),
        (94, 512, (0, 0)),
    ],
)
def test_weights_stay_within_their_bytes(layers: int, experts: int, expected: tuple[int, int]) -> None:
    assert inputs(layers, experts) == expected
    assert sum(expected) * layers * experts**2 * 4 <= online.LARGEST
