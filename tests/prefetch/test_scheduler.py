"""The scheduler reads ahead what its predictor has been right about, and leaves alone one that is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flashmoe.cache.residency import make_residency
from flashmoe.prefetch import PredictorError, create_all, scheduler
from flashmoe.prefetch.base import Float32, Int32, Predictor
from flashmoe.prefetch.guessing import MOST
from flashmoe.prefetch.scheduler import Prefetcher
from flashmoe.prefetch.table import Table

LAYERS, EXPERTS, TOP_K = 6, 16, 4


class Scripted(Predictor):
    """Says with certainty what `guess` says."""

    name = "scripted"

    def __init__(self, guess: Any) -> None:
        super().__init__()
        self._guess = guess
        self.predicted = self.learned = 0
        self.bind(LAYERS, EXPERTS, TOP_K)

    def make_state(self, n_layers: int, n_experts: int, top_k: int) -> None:
        pass

    def begin_sequence(self) -> None:
        pass

    def begin_step(self, token: int) -> None:
        self.token = token

    def observe(self, layer: int, ids: Int32) -> None:
        self.learned += 1

    def observe_many(self, layer: int, ids: Int32, tokens: Int32) -> None:
        self.seen = layer, ids.tolist(), tokens.tolist()

    def predict(self, layer: int, target: int, out: Float32) -> None:
        self.predicted += 1
        out[:] = 0
        out[self._guess(self.token, target)] = 0.9


class Wishes:
    """Stands where the cache is, and notes what is to be prefetched; nothing is resident."""

    def __init__(self) -> None:
        quota = np.full(LAYERS, TOP_K, np.int32)
        self.policy = SimpleNamespace(residency=make_residency(LAYERS, EXPERTS, quota))
        self.asked: list[tuple[int, list[int]]] = []
        self.seconds_per_miss = 1.0

    def prefetch(self, layer: int, experts: list[int]) -> None:
        self.asked.append((layer, experts))


def routing(token: int, layer: int) -> list[int]:
    return np.random.default_rng([token, layer]).choice(EXPERTS, TOP_K, replace=False).tolist()


def right(token: int, layer: int) -> list[int]:
    return routing(token, layer)[:2]


def wrong(token: int, layer: int) -> list[int]:
    return [e for e in range(EXPERTS) if e not in routing(token, layer)][:2]


def decode(prefetcher: Prefetcher, tokens: range) -> None:
    for token in tokens:
        prefetcher.begin_step([token])
        for layer in range(LAYERS):
            prefetcher.routed(layer, np.array(routing(token, layer), np.int32))


def test_right_guesses_are_prefetched() -> None:
    cache = Wishes()
    decode(Prefetcher([Scripted(right)], cache), range(50))  # type: ignore[arg-type]
    assert len(cache.asked) == 50 * LAYERS
    for number, (layer, experts) in enumerate(cache.asked):
        token, place = divmod(number, LAYERS)
        assert layer == place
        assert sorted(experts) == sorted(right(token, layer))
        assert len(experts) <= MOST


def test_wrong_guesses_stop() -> None:
    cache, predictor = Wishes(), Scripted(wrong)
    prefetcher = Prefetcher([predictor], cache)  # type: ignore[arg-type]
    decode(prefetcher, range(30))
    wished = sum(len(experts) for _, experts in cache.asked)
    assert 0 < wished < 30  # a few had to be tried
    asked, predicted = len(cache.asked), predictor.predicted
    decode(prefetcher, range(30, 110))
    assert not any(experts for _, experts in cache.asked[asked:])
    assert predictor.predicted - predicted <= 80 * LAYERS / 8  # it is hardly asked any more


def test_auto_goes_on_to_the_next_predictor() -> None:
    cache, first, second = Wishes(), Scripted(wrong), Scripted(right)
    prefetcher = Prefetcher([first, second], cache)  # type: ignore[arg-type]
    assert prefetcher.predictor is first
    decode(prefetcher, range(40))
    assert prefetcher.predictor is second
    assert cache.asked[-1] == (LAYERS - 1, right(39, LAYERS - 1)) or set(cache.asked[-1][1]) == set(
        right(39, LAYERS - 1)
    )


def test_auto_teaches_the_others_until_one_has_proved_itself() -> None:
    first, second = Scripted(right), Scripted(right)
    decode(Prefetcher([first, second], Wishes()), range(40))  # type: ignore[arg-type]
    assert 0 < second.learned < first.learned == 40 * LAYERS
    first, second = Scripted(wrong), Scripted(right)
    prefetcher = Prefetcher([first, second], Wishes())  # type: ignore[arg-type]
    prefetcher.begin_step([7, 8])
    prefetcher.routed_many(0, np.zeros((2, TOP_K), np.int32))
    assert second.seen == (0, [[0] * TOP_K] * 2, [7, 8])
    decode(prefetcher, range(40))
    assert 0 < first.learned < second.learned == 40 * LAYERS


def test_a_predictor_that_becomes_right_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    cache = Wishes()
    prefetcher = Prefetcher([Scripted(lambda t, layer: (wrong if t < 100 else right)(t, layer))], cache)  # type: ignore[arg-type]
    decode(prefetcher, range(100))
    before = sum(len(experts) for _, experts in cache.asked)
    decode(prefetcher, range(100, 900))
    assert sum(len(experts) for _, experts in cache.asked) - before > 400 * LAYERS


def test_right_guesses_that_take_longer_than_the_waits_they_save_stop() -> None:
    """A clock that goes on only while a predictor is asked, and a little with each token."""
    now = 0.0
    cache = Wishes()

    class Slow(Scripted):
        def predict(self, layer: int, target: int, out: Float32) -> None:
            nonlocal now
            now += 0.001
            super().predict(layer, target, out)

    predictor = Slow(right)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "time", SimpleNamespace(perf_counter=lambda: now))
        prefetcher = Prefetcher([predictor], cache)  # type: ignore[arg-type]

        def asked(tokens: range) -> int:
            nonlocal now
            before = predictor.predicted
            for token in tokens:
                now += 0.010
                decode(prefetcher, range(token, token + 1))
            return predictor.predicted - before

        cache.seconds_per_miss = 0.001  # two right guesses of each layer
        assert asked(range(100)) == 100 * LAYERS
        cache.seconds_per_miss = 0.0001
        asked(range(100, 130))
        assert asked(range(130, 430)) <= 0.02 * 300 * 10 * 1.1  # 2 % of the time
        cache.seconds_per_miss = 0.01  # the drive has become slow
        asked(range(430, 530))
        assert asked(range(530, 560)) == 30 * LAYERS


def test_a_layer_is_asked_about_while_what_it_misses_takes_longer_than_asking() -> None:
    """Waiting for a miss takes a tenth of asking, or ten times as long; layer 2 misses nothing that is picked."""
    now = 0.0
    cache = Wishes()
    asked: list[int] = []

    class Slow(Scripted):
        def predict(self, layer: int, target: int, out: Float32) -> None:
            nonlocal now
            now += 0.001
            asked.append(target)
            super().predict(layer, target, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "time", SimpleNamespace(perf_counter=lambda: now))
        prefetcher = Prefetcher([Slow(right)], cache)  # type: ignore[arg-type]
        patch.setattr(prefetcher, "_judge", lambda: None)
        cache.seconds_per_miss = 0.01
        slots = cache.policy.residency.slot_of
        for token in range(300):
            slots[2] = -1
            slots[2, routing(token, 2)] = 0
            decode(prefetcher, range(token, token + 1))
        late = asked[-150 * LAYERS :]
        assert late.count(1) == late.count(3) > 100
        assert late.count(2) < 30
        cache.seconds_per_miss = 0.0001
        asked.clear()
        decode(prefetcher, range(200))
        assert len(asked) < 0.2 * 200 * LAYERS
        cache.seconds_per_miss = 0.01
        slots[2] = -1
        decode(prefetcher, range(200, 300))
        asked.clear()
        decode(prefetcher, range(300, 310))
        assert asked == [*range(LAYERS)] * 10


def test_residents_are_not_prefetched() -> None:
    cache = Wishes()
    cache.policy.residency.slot_of[:, :] = 0
    decode(Prefetcher([Scripted(right)], cache), range(5))  # type: ignore[arg-type]
    assert not any(experts for _, experts in cache.asked)


def test_prompts_are_shown_to_the_predictor() -> None:
    predictor = Scripted(right)
    prefetcher = Prefetcher([predictor], Wishes())  # type: ignore[arg-type]
    prefetcher.begin_step([7, 8, 9])
    prefetcher.routed_many(
        2, np.array([[1, 2], [3, 4]], np.int32)
    )  # a layer that saw the last two tokens only
    assert predictor.seen == (2, [[1, 2], [3, 4]], [8, 9])


def test_specs() -> None:
    assert [p.name for p in create_all("auto")] == ["gate", "table"]
    assert create_all("none") == []
    assert [p.name for p in create_all("moe-infinity")] == ["moe-infinity"]
    with pytest.raises(PredictorError, match="unknown predictor 'gaet'"):
        create_all("gaet")


class InPython(Table):
    """Whose calls are all made in Python."""

    def compiled(self) -> None:
        pass


def test_compiled_turns_are_those_in_python() -> None:
    """The same wishes and the same knowledge, where the predictor and its judgement are compiled."""
    asked, states = [], []
    for kind in (Table, InPython):
        cache, predictor = Wishes(), kind()
        predictor.bind(LAYERS, EXPERTS, TOP_K)
        cache.policy.residency.slot_of[:, :3] = 1
        prefetcher = Prefetcher([predictor], cache)
        assert (prefetcher.compiled is None) or kind is Table
        for token in range(300):  # five words, again and again
            prefetcher.begin_step([token % 5])
            assert (prefetcher.compiled is not None) == (kind is Table)
            for layer in range(LAYERS):
                prefetcher.routed(layer, np.array(routing(token % 5, layer), np.int32))
        asked.append([(layer, experts) for layer, experts in cache.asked if experts])
        states.append(predictor.state())
    assert asked[0] == asked[1]
    assert len(asked[0]) > 100
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])
