"""The predictor `gate`: which rows of a router it reads, in every type, and what it makes of them."""

from __future__ import annotations

import ctypes as C
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashmoe.prefetch.gate import Gate, Router
from flashmoe.prefetch.gate_kernels import expect, products

EXPERTS, WIDTH, TOP_K = 16, 40, 3
CALL4, CALL5 = C.CFUNCTYPE(C.c_int64, *[C.c_int64] * 4), C.CFUNCTYPE(C.c_int64, *[C.c_int64] * 5)


def stored(values: NDArray[Any], kind: type) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """A matrix as a Router has it in a type, and the numbers that it then holds."""
    values = values.astype(np.float32)
    if kind is np.int16:
        half = values.astype(np.float16)
        return half.view(np.int16), half.astype(np.float32)
    if kind is np.uint16:
        bits = values.view(np.uint32) >> 16
        return bits.astype(np.uint16), (bits << 16).view(np.float32)
    return values, values


def router(weights: NDArray[Any], norm: NDArray[np.float32] | None = None) -> Router:
    empty = np.zeros(0, np.float32)
    return Router(
        weights, np.ones(WIDTH, np.float32) if norm is None else norm, np.zeros(EXPERTS, np.float32), empty
    )


@pytest.mark.parametrize("kind", [np.float32, np.int16, np.uint16])
def test_rows_of_absent_experts_and_of_the_residents_picked_most(kind: type) -> None:
    draw = np.random.default_rng(0)
    values = draw.standard_normal((EXPERTS, WIDTH))
    weights, numbers = stored(values, kind)
    resident, hot = [0, 3, 4, 7, 11], {4, 11}
    slot_of, picked = np.full(EXPERTS, -1, np.int32), np.ones(EXPERTS, np.float32)
    slot_of[resident] = 1
    picked[list(hot)] = 2
    scaled = draw.uniform(0.5, 1.5, WIDTH).astype(np.float32)
    experts, out = np.zeros(EXPERTS, np.int32), np.full(EXPERTS, np.nan, np.float32)
    absent, found = products(weights, slot_of, picked, len(hot), scaled, experts, out)
    assert experts[:absent].tolist() == np.flatnonzero(slot_of < 0).tolist()
    assert set(experts[absent:found].tolist()) == hot
    assert sorted(experts.tolist()) == list(range(EXPERTS))
    np.testing.assert_allclose(out[:found], numbers[experts[:found]] @ scaled, rtol=1e-4, atol=1e-4)
    assert np.isnan(out[found:]).all()  # their rows were left alone


@pytest.mark.parametrize("kind", [np.float32, np.int16, np.uint16])
def test_every_number_is_what_it_is(kind: type) -> None:
    values = np.array(
        [0, -0.0, 1, -1, 6e-8, -6e-8, 6.1e-5, 1e-3, 0.1, -0.3, 3, 1000, 65504, -65504, 2**-14, 7]
    )
    weights, numbers = stored(values[:, np.newaxis], kind)
    one, out = np.ones(1, np.float32), np.empty(EXPERTS, np.float32)
    experts = np.zeros(EXPERTS, np.int32)
    products(weights, experts - 1, out, 0, one, experts, out)
    assert out.tolist() == numbers[:, 0].tolist()


def test_the_state_ahead_is_the_present_one_and_the_mean_shift() -> None:
    draw = np.random.default_rng(3)
    hidden, old, new = (draw.uniform(0.5, 1.5, WIDTH).astype(np.float32) for _ in range(3))
    old[3] = 0  # nothing is known of that number without its norm
    shift = draw.standard_normal((2, WIDTH)).astype(np.float32)
    for between in range(3):
        scaled = np.empty(WIDTH, np.float32)
        expect(hidden, old, new, shift[:between], scaled)
        ahead = (hidden / np.where(old == 0, 1, old) + shift[:between].sum(axis=0)) * new
        np.testing.assert_allclose(scaled, np.where(old == 0, hidden, ahead), rtol=1e-5, atol=1e-5)


def test_the_mean_shift_is_learned() -> None:
    """The second layer's state is the first one's and a constant, which is larger: only with it are the picks found."""
    draw = np.random.default_rng(4)
    weights = draw.standard_normal((EXPERTS, WIDTH)).astype(np.float32)
    norms = [draw.uniform(0.5, 1.5, WIDTH).astype(np.float32) for _ in range(2)]
    constant = 3 * draw.standard_normal(WIDTH).astype(np.float32)
    made = Gate()
    made.bind(2, EXPERTS, TOP_K)
    made.use_routers([router(weights, norm) for norm in norms])
    out, found = np.zeros(EXPERTS, np.float32), []
    for _ in range(200):
        states = [draw.standard_normal(WIDTH).astype(np.float32)]
        states.append(states[0] + constant)
        made.begin_step(0)
        for layer, (state, norm) in enumerate(zip(states, norms, strict=True)):
            picked = np.argsort(-(weights @ (state * norm)))[:TOP_K].astype(np.int32)
            if layer == 1:
                found.append(len(set(picked) & set(np.argsort(-out)[:TOP_K])) / TOP_K)
            made.see(layer, state * norm)
            made.observe(layer, picked)
            if layer == 0:
                made.predict(0, 1, out)
    assert np.mean(found[:5]) < 0.7
    assert np.mean(found[100:]) > 0.95


def gate(weights: NDArray[np.float32]) -> Gate:
    """Of two layers, the second with these weights."""
    made = Gate()
    made.bind(2, EXPERTS, TOP_K)
    made.use_routers([router(weights), router(weights)])
    return made


def test_residents_get_no_chance_and_the_nearest_to_be_picked_the_largest() -> None:
    draw = np.random.default_rng(1)
    weights = draw.standard_normal((EXPERTS, WIDTH)).astype(np.float32)
    made, slot_of = gate(weights), np.full((2, EXPERTS), -1, np.int32)
    slot_of[1, [2, 9, 14]] = 5
    made.use_residency(slot_of)
    hidden = draw.standard_normal(WIDTH).astype(np.float32)
    made.begin_step(0)
    made.see(0, hidden)
    out = np.full(EXPERTS, 7, np.float32)
    made.predict(0, 1, out)
    absent = np.flatnonzero(slot_of[1] < 0)
    assert not out[[2, 9, 14]].any()
    assert ((out[absent] > 0) & (out[absent] < 1)).all()
    assert (np.argsort(out[absent]) == np.argsort((weights @ hidden)[absent])).all()
    made.begin_step(0)
    made.predict(0, 1, out)
    assert not out.any()  # this token's hidden state is not known


def test_a_chance_becomes_what_it_says() -> None:
    """The layers differ by noise, and a third of the experts is resident: those that are picked most."""
    draw = np.random.default_rng(2)
    weights = draw.standard_normal((EXPERTS, WIDTH)).astype(np.float32)
    weights[:5] *= 1.5
    made, slot_of = gate(weights), np.full((2, EXPERTS), -1, np.int32)
    slot_of[:, :5] = 0
    made.use_residency(slot_of)
    said, came = [], []
    out = np.zeros(EXPERTS, np.float32)
    for step in range(2500):
        hidden = draw.standard_normal(WIDTH).astype(np.float32)
        made.begin_step(0)
        made.see(0, hidden)
        made.observe(0, np.arange(TOP_K, dtype=np.int32))
        made.predict(0, 1, out)
        logits = weights @ hidden + draw.normal(0, 3, EXPERTS)
        picked = np.argsort(-logits)[:TOP_K].astype(np.int32)
        if step >= 500:
            said += out[5:].tolist()
            came += np.isin(np.arange(5, EXPERTS), picked).tolist()
        made.observe(1, picked)
    chances, right = np.array(said), np.array(came)
    assert chances.max() > 0.7
    for low in np.arange(0, 0.8, 0.2):
        among = (chances >= low) & (chances < low + 0.2)
        assert among.sum() > 50
        assert right[among].mean() == pytest.approx(chances[among].mean(), abs=0.08)
    kept = made.state()
    other = gate(weights)
    other.load_state(kept)
    assert all(np.array_equal(kept[name], value) for name, value in other.state().items())


def test_a_prompt_shows_who_is_picked_most() -> None:
    made = gate(np.zeros((EXPERTS, WIDTH), np.float32))
    ids = np.array([[1, 2, 3], [1, 2, 4], [1, 5, 6]], np.int32)
    made.observe_many(1, ids, np.zeros(3, np.int32))
    order = np.argsort(-made.state()["picked"][1], kind="stable")
    assert order[:2].tolist() == [1, 2]
    assert set(order[:6].tolist()) == {1, 2, 3, 4, 5, 6}


def test_called_by_compiled_code_it_says_the_same() -> None:
    """From the address of a hidden state, and learning from ids at an address."""
    draw = np.random.default_rng(3)
    weights = draw.standard_normal((EXPERTS, WIDTH)).astype(np.float32)
    ones, others = gate(weights), gate(weights)
    entry = others.compiled()
    assert entry is not None
    observe, predict = CALL5(entry.observe), CALL4(entry.predict)
    out = np.zeros((2, EXPERTS), np.float32)
    for _ in range(20):
        hidden = draw.standard_normal(WIDTH).astype(np.float32)
        for made in (ones, others):
            made.begin_step(0)
        for layer in range(2):
            ids = draw.permutation(EXPERTS)[:TOP_K].astype(np.int32)
            ones.see(layer, hidden)
            ones.observe(layer, ids)
            observe(entry.state, layer, ids.ctypes.data, TOP_K, hidden.ctypes.data)
            if layer == 0:
                ones.predict(0, 1, out[0])
                predict(entry.state, 0, 1, out[1].ctypes.data)
                assert out[0].any()
                assert np.array_equal(out[0], out[1])
    fits = [made.state()["fit"] for made in (ones, others)]
    assert np.array_equal(*fits)
    assert (fits[0][1] != fits[0][0]).any()
