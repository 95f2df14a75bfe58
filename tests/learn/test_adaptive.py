"""The adaptive policy leaves a bad member at once and follows a good one."""

from __future__ import annotations

import numpy as np
import pytest

from flashmoe.cache.policies import create
from flashmoe.cache.policies.adaptive import AGED, Adaptive
from flashmoe.cache.policies.flashmoe_plus import FlashmoePlus
from flashmoe.cache.residency import check_residency, make_residency
from flashmoe.errors import PolicyError
from flashmoe.routing.trace import RoutingTrace
from flashmoe.simulate.replay import replay
from flashmoe.storage.hub import default_policy
from tests.learn.test_learned import untrained
from tests.simulate.traces import VALIDATION, made_up, real


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
def test_never_far_below_its_best_member(share: float) -> None:
    """On real routing, with a network of random weights as one of the members."""
    trace = real(VALIDATION).rows(np.arange(2500))
    slots = round(share * 26 * 64)
    bad = untrained("flashmoe+", 26, 64, 6, r=8, h=16)
    rates = {
        p.name: replay(trace, p, slots).hit_rate
        for p in (create("lru"), create("lfu-aged"), FlashmoePlus(trained=bad))
    }
    adaptive = Adaptive(trained=bad)
    assert replay(trace, adaptive, slots).hit_rate > max(rates.values()) - 0.005
    assert rates["flashmoe+"] < max(rates.values()) - 0.01
    assert adaptive.drivers()["flashmoe+"] < 6
    check_residency(adaptive.residency)


@pytest.mark.parametrize("name", ["olmoe-1b-7b-decode.npz", "glm-4.5-air-decode.npz", VALIDATION])
@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
def test_the_default_is_safe_from_the_first_token_on(name: str, share: float) -> None:
    """Texts of 60 to 300 tokens, in which little can be learnt: at most 0.3 points below the moving average."""
    trace = real(name)
    slots = round(share * trace.n_layers * trace.num_experts)
    for tokens, most in ((60, 20), (300, 10)):
        tokens = min(tokens, trace.n_tokens)
        for start in range(0, trace.n_tokens - tokens + 1, tokens)[:most]:
            piece = trace.rows(np.arange(start, start + tokens))
            default, average = (
                replay(piece, create(n), slots).hit_rate for n in (default_policy(""), "lfu-aged")
            )
            assert default > average - 0.003


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_bad_member_costs_no_more_at_the_start(share: float) -> None:
    """Nor does a trained policy that knows nothing, which is the first to choose."""
    trace = real(VALIDATION).rows(np.arange(200))
    slots = round(share * 26 * 64)
    bad = untrained("flashmoe+", 26, 64, 6, r=8, h=16)
    policies = (create("lfu-aged"), Adaptive(trained=bad), FlashmoePlus(trained=bad))
    average, adaptive, alone = (replay(trace, p, slots).hits.sum(axis=1).cumsum() for p in policies)
    bound = 0.003 * 26 * 6 * np.arange(1, 201) + 1
    assert (average - adaptive <= bound).all()
    assert (average - alone > bound).any()


def test_follows_what_the_text_favours() -> None:
    """A loop one longer than the cache: LRU never hits, a frequency keeps what it has."""
    rng = np.random.default_rng(0)
    often = np.where(rng.random(4000) < 0.5, rng.integers(0, 3, 4000), 3 + np.arange(4000) % 9)
    trace = RoutingTrace(often.astype(np.int16).reshape(-1, 1, 1), 12)
    rates = {name: replay(trace, create(name), 4).hit_rate for name in ("lru", "lfu-aged", "adaptive")}
    assert rates["lfu-aged"] > rates["lru"] + 0.02
    assert rates["adaptive"] > rates["lfu-aged"] - 0.01


def test_where_nothing_is_evicted_nothing_is_learnt() -> None:
    """A share that holds all experts costs what the moving average does, which a smaller one would go on from."""
    trace, whole = made_up(200), create("adaptive")
    assert replay(trace, whole, trace.n_layers * trace.num_experts).requests.sum() > 0
    state = whole.state()
    assert not state["gain"].any()
    assert not state["online.steps"].any()
    assert state["score"][AGED].any(axis=1).all()
    part = create("adaptive")
    replay(trace, part, trace.n_layers * trace.num_experts // 2)
    assert part.state()["gain"].any()


def test_state_and_partitions() -> None:
    trace = made_up(200)
    file = untrained("flashmoe+", 3, 16, 2)
    for partition in ("per-layer", "global", "weighted"):
        policy = Adaptive(trained=file)
        assert 0 < replay(trace, policy, 18, partition).hit_rate < 1
        saved = policy.state()
        policy.bind(policy.residency)
        policy.load_state(saved)
        assert all((policy.state()[name] == value).all() for name, value in saved.items())
    with pytest.raises(PolicyError, match="saved state"):
        policy.load_state({})
    with pytest.raises(PolicyError, match="held"):  # a shadow cache that lists an expert twice
        policy.load_state(saved | {"held": np.zeros_like(saved["held"])})
    assert all((policy.state()[name] == value).all() for name, value in saved.items())
    with pytest.raises(PolicyError, match="trained for"):
        policy.bind(make_residency(2, 16, [2, 2]))
