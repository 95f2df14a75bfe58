"""A predictor as a plug-in: every layer picks what it picked for the last token.

Another package registers it in its pyproject.toml, and then `--prefetch last-token` finds it:

    [project.entry-points."flashmoe.predictors"]
    last-token = "last_token_predictor:LastToken"

`python examples/last_token_predictor.py` checks it against what a predictor promises.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.prefetch.base import Float32, Int32, Predictor


class LastState(NamedTuple):
    """What each layer picked last, float32 [L, E]: 1 for picked."""

    picked: NDArray[np.float32]


class LastToken(Predictor):
    """The last token's experts."""

    name = "last-token"

    def make_state(self, n_layers: int, n_experts: int, top_k: int) -> LastState:
        return LastState(np.zeros((n_layers, n_experts), np.float32))

    def begin_sequence(self) -> None:
        self._state.picked[:] = 0

    def begin_step(self, token: int) -> None:
        """The token does not matter here."""

    def observe(self, layer: int, ids: Int32) -> None:
        self._state.picked[layer] = 0
        self._state.picked[layer, ids] = 1

    def observe_many(self, layer: int, ids: Int32, tokens: Int32) -> None:
        self.observe(layer, ids[-1])

    def predict(self, layer: int, target: int, out: Float32) -> None:
        out[:] = self._state.picked[target]


def main() -> None:
    predictor = LastToken()
    predictor.bind(n_layers=2, n_experts=8, top_k=2)
    chances = np.zeros(8, np.float32)
    for token, experts in enumerate(([1, 5], [1, 6])):
        predictor.begin_step(token)
        for layer in range(2):
            predictor.predict(layer - 1, layer, chances)
            assert ((chances >= 0) & (chances <= 1)).all()
            assert chances.sum() in (0, predictor.top_k)  # all 0 where nothing is known yet
            predictor.observe(layer, np.array(experts, np.int32))
    predictor.begin_step(2)
    predictor.predict(-1, 0, chances)
    assert np.flatnonzero(chances).tolist() == [1, 6]
    kept = predictor.state()
    predictor.begin_sequence()
    predictor.load_state(kept)
    predictor.predict(-1, 1, chances)
    assert np.flatnonzero(chances).tolist() == [1, 6]
    print("last-token: as a predictor should be")


if __name__ == "__main__":
    main()
