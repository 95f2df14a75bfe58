"""What is guessed about the next layer of a short prompt: absent experts, the likeliest first, while it is right."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashmoe.cache.residency import make_residency
from flashmoe.prefetch.base import Float32, Predictor
from flashmoe.prefetch.prompts import PromptGuesses

LAYERS, EXPERTS = 3, 16


class Told(Predictor):
    """A token's chances are its hidden state."""

    needs_hidden = True

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self._hidden: Float32 = np.zeros(EXPERTS, np.float32)

    def see(self, layer: int, hidden: Float32) -> None:
        self._hidden = hidden

    def predict(self, layer: int, target: int, out: Float32) -> None:
        self.asked += 1
        out[:] = self._hidden


def guesses(resident: set[int]) -> tuple[PromptGuesses, Told]:
    """About layers that each have the same residents."""
    residency = make_residency(LAYERS, EXPERTS, np.full(LAYERS, EXPERTS, np.int32))
    residency.slot_of[:, sorted(resident)] = 0
    predictor = Told()
    return PromptGuesses([Predictor(), predictor], residency), predictor


def picks(*experts: int) -> NDArray[np.int32]:
    return np.array([experts], np.int32)


@given(
    st.lists(
        st.lists(st.floats(0, 1, width=32), min_size=EXPERTS, max_size=EXPERTS), min_size=1, max_size=80
    ),
    st.sets(st.integers(0, EXPERTS - 1)),
)
def test_absent_experts_that_a_token_will_probably_pick(rows: list[list[float]], resident: set[int]) -> None:
    made, predictor = guesses(resident)
    hidden = np.array(rows, np.float32)
    experts = made.next_layer(0, picks(0, 1), lambda: hidden)
    assert predictor.asked <= 32
    best = hidden[:: -(-len(hidden) // 32)].max(axis=0)
    assert set(experts) == {e for e in range(EXPERTS) if e not in resident and best[e] >= 0.5}
    assert [best[e] for e in experts] == sorted((best[e] for e in experts), reverse=True)


def test_nothing_after_the_last_layer_or_where_all_absent_experts_are_read_anyway() -> None:
    made, _ = guesses(set())
    sure = np.ones((2, EXPERTS), np.float32)
    assert made.next_layer(1, picks(0, 1), lambda: sure) == list(range(EXPERTS))
    assert made.next_layer(LAYERS - 1, picks(0, 1), lambda: sure) == []
    assert made.next_layer(0, picks(*range(12)), lambda: sure) == []  # 12 of 16: see `SURE`


def test_wrong_guesses_are_given_up_and_tried_again_later() -> None:
    made, _ = guesses(set())
    hidden = np.zeros((2, EXPERTS), np.float32)
    hidden[:, 4:8] = 1
    right, wrong = picks(4, 5, 6, 7), picks(0, 1, 2, 3)
    asked = [bool(made.next_layer(i % (LAYERS - 1), right, lambda: hidden)) for i in range(40)]
    assert all(asked)
    asked = [bool(made.next_layer(i % (LAYERS - 1), wrong, lambda: hidden)) for i in range(400)]
    assert asked[0]
    assert not all(asked[:60])
    assert any(asked[100:])
    assert np.mean(asked) < 0.5
    asked = [bool(made.next_layer(i % (LAYERS - 1), right, lambda: hidden)) for i in range(400)]
    assert all(asked[200:])
