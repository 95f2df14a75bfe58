"""`flashmoe+` trained in numpy: its gradients are torch's, and slopes; training without torch learns."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from flashmoe.learn import plus
from flashmoe.learn.plus_shape import DECAYS, Sizes
from flashmoe.learn.samples import Samples
from tests.simulate.traces import made_up

SMALL = Sizes(r=8, h=16, k=3, m=5)


def first_batch(tokens: int = 200, *, absent: bool = False) -> plus.Batch:
    trace = made_up(tokens)
    if absent:
        trace.expert_ids[::7, 1] = -1  # a layer that does not see every token
    return Samples(trace, DECAYS).batch([0, 1])


@pytest.mark.parametrize("absent", [False, True])
def test_gradients_are_torch_s(absent: bool) -> None:
    torch = pytest.importorskip("torch", reason="compares with torch: pip install 'flashmoe-ssd[train]'")
    from flashmoe.learn.networks import PlusNet

    batch = first_batch(absent=absent)
    net = PlusNet(3, 16, r=SMALL.r, h=SMALL.h, k=SMALL.k, m=SMALL.m).eval()
    rng = np.random.default_rng(0)
    weights = plus.start(3, 16, SMALL, rng)
    weights["v0"] += rng.standard_normal(weights["v0"].shape).astype(np.float32)
    for name, value in net.named_parameters():
        value.data = torch.from_numpy(weights[name].reshape(value.shape))
    loss = net.loss(batch)
    loss.backward()
    found = {name: np.empty_like(value) for name, value in weights.items()}
    assert plus.gradients(weights, batch, found) == pytest.approx(loss.item(), rel=1e-5)
    for name, value in net.named_parameters():
        want = value.grad.numpy().reshape(found[name].shape)
        np.testing.assert_allclose(found[name], want, rtol=1e-3, atol=1e-4 * np.abs(want).max(), err_msg=name)
    exported = plus.export(weights, SMALL)
    for name, value in net.export().items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)


def test_gradients_are_slopes() -> None:
    batch = first_batch()
    rng = np.random.default_rng(1)
    weights = plus.start(3, 16, SMALL, rng)
    found = {name: np.empty_like(value) for name, value in weights.items()}
    scratch = {name: np.empty_like(value) for name, value in weights.items()}
    plus.gradients(weights, batch, found)
    for name, slope in found.items():
        direction = slope / max(1e-12, float(np.linalg.norm(slope)))
        step = 1e-2
        losses = [
            plus.gradients(weights | {name: weights[name] + sign * step * direction}, batch, scratch)
            for sign in (1, -1)
        ]
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(
            float(np.linalg.norm(slope)), rel=0.03
        ), name


def test_the_rate_rises_and_falls() -> None:
    rates = [plus.rate_at(share) for share in np.linspace(0, 1, 101)]
    assert np.argmax(rates) == 10
    assert max(rates) == pytest.approx(plus.RATE)
    assert rates[-1] == pytest.approx(0)
    assert (np.diff(rates[:11]) > 0).all()
    assert (np.diff(rates[10:]) < 0).all()


def test_training_learns_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    data = Samples(made_up(1200), DECAYS)
    seen: list[tuple[int, int]] = []
    _, losses = plus.train(
        data, SMALL, epochs=4, progress=lambda done, steps, loss: seen.append((done, steps))
    )
    assert losses[-1] < losses[0] - 0.02
    assert seen[-1] == (len(seen), len(seen))
    again, same = plus.train(data, SMALL, epochs=4)
    assert same == losses
    assert all(np.isfinite(value).all() for value in again.values())
