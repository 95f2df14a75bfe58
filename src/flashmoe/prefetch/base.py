"""The interface of predictors of routing, for the prefetch scheduler and the simulator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numba import types
from numpy.typing import NDArray

from flashmoe.cache.saved import Limits, load_state
from flashmoe.errors import FlashMoEError

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


#: Layers between the last router that has spoken and the target, as predictors are trained and judged; 0: the token
#: alone is known.
AHEAD = (0, 1, 2, 4)


class PredictorError(FlashMoEError):
    """A predictor that is unknown, damaged, or made for another model."""

    exit_status = 2


#: Of Compiled.observe and of Compiled.predict.
OBSERVE, PREDICT = types.int64(*(types.int64,) * 5), types.int64(*(types.int64,) * 4)


class Compiled(NamedTuple):
    """`Predictor.observe` and `Predictor.predict` for compiled callers; all arguments and results are int64."""

    observe: int  # address of function(state, layer, ids, n, hidden): int32 [n] and, or 0, float32 (see) at addresses
    predict: int  # address of function(state, layer, target, out): float32 [E] at an address
    state: int  # their first argument


class Predictor:
    """Says which experts the layers ahead will pick: L MoE layers of E experts, k of them per token.

    Calls, in the order of a decode step:

        begin_step(token)                         the token is known, nothing has been routed
        predict(-1, target, out)                  for any layers, any number of times
        observe(0, ids); predict(0, target, out)  the router of layer 0 has spoken; and so on up to layer L - 1

    and of a micro-batch of a prompt, which needs no begin_step: observe_many(layer, ids, tokens) for each layer.
    A step may end early (the engine failed, Ctrl-C): the next begin_step or observe_many starts afresh.

    `predict` knows only what was observed before it. Learning while running is part of `observe`. State is kept
    in numpy arrays and work done in compiled kernels: a call takes some microseconds. One thread at a time.
    """

    name: ClassVar[str] = ""
    #: True for predictors that are made from a trained file (NAME:FILE).
    needs_file: ClassVar[bool] = False
    #: True for predictors that need the routers' inputs (`see`), which no trace has.
    needs_hidden: ClassVar[bool] = False
    #: True for predictors that want what routers say of experts that they do not pick: see `rank`.
    needs_ranking: ClassVar[bool] = False

    def __init__(self) -> None:
        self.n_layers = self.n_experts = self.top_k = 0
        self._state: Any = None

    # What subclasses give ---------------------------------------------------------------------------------

    def make_state(self, n_layers: int, n_experts: int, top_k: int) -> Any:
        """A NamedTuple of arrays, as at the start of a session. Raises PredictorError where a trained file
        is for another shape."""
        raise NotImplementedError

    def begin_sequence(self) -> None:
        """A new prompt or conversation begins."""
        raise NotImplementedError

    def begin_step(self, token: int) -> None:
        """A single token is about to be evaluated: its id in the vocabulary, -1 where that is unknown."""
        raise NotImplementedError

    def observe(self, layer: int, ids: Int32) -> None:
        """The experts that the router of a layer picked for the token of this step, int32 [n] without
        repetition. Layers come in order, each once (or not at all)."""
        raise NotImplementedError

    def observe_many(self, layer: int, ids: Int32, tokens: Int32) -> None:
        """The same for a micro-batch: ids int32 [T, k], tokens int32 [T] of their ids (-1: unknown), in the
        order of the text. A layer that saw fewer tokens than others saw the last ones."""
        raise NotImplementedError

    def predict(self, layer: int, target: int, out: Float32) -> None:
        """Fill out, float32 [E], with the chance that layer `target` picks each expert in this step.

        Layers 0..layer have been observed in this step; -1: none, the token alone is known. target > layer.
        Chances are calibrated as well as is cheap: they lie in 0..1 and sum up to about k, or are all 0
        where nothing is known yet.
        """
        raise NotImplementedError

    def predict_many(self, layer: int, target: int, hidden: Float32, out: Float32) -> None:
        """Fill out, float32 [E], with the largest chance that a token of a micro-batch picks each expert.

        hidden: the inputs of a layer's router, float32 [tokens, n]. Of predictors with `needs_hidden`.
        """
        chances = np.empty_like(out)
        out[:] = 0
        for seen in hidden:
            self.see(layer, seen)
            self.predict(layer, target, chances)
            np.maximum(out, chances, out=out)

    def use_routers(self, routers: Sequence[Any]) -> None:
        """The routers of all layers (gate.Router), from an engine that can show them; kept by `gate` only."""

    def use_embeddings(self, embed: Callable[[Sequence[int]], Float32]) -> None:
        """The embeddings of the model's tokens, float32 [n, d], by their ids; of predictors with `needs_ranking`."""

    def rank(self, layer: int, ids: NDArray[Any], scores: NDArray[Any]) -> None:
        """What a layer's router says of its best experts, for the token of this step, before `observe`, where that is
        known.

        ids: [n], -1: none; scores: [n], logarithms of theirs, less the best one's. Of predictors with `needs_ranking`.
        """

    def use_residency(self, slot_of: Int32) -> None:
        """After `bind`: the slots of all experts, int32 [L, E], -1 for those not resident. They change; a predictor for
        which that saves time may leave the chances of residents at 0: they need no guesses."""

    def see(self, layer: int, hidden: Float32) -> None:
        """The input of a layer's router for the token of this step, float32 [n], before `observe`; only from
        engines that can show it. The memory is valid until the next call of any method."""

    def compiled(self) -> Compiled | None:
        """What compiled code calls instead of `see`, `observe` and `predict`, from `begin_step` to the end of the step.

        None: all calls are to be made in Python.
        """
        return None

    def restrict(self, nbytes: int) -> None:
        """Before `bind`: take no more memory than this, where that can be chosen (see `nbytes`)."""

    def check_model(self, model: Mapping[str, Any]) -> None:
        """Raise PredictorError where it was trained for another model than this identity says."""

    # What callers use -------------------------------------------------------------------------------------

    def bind(self, n_layers: int, n_experts: int, top_k: int) -> None:
        """Fit to a model of L MoE layers of E experts, k per token, and start from nothing (or from the
        trained file). Raises PredictorError where the predictor does not fit that shape."""
        if n_layers < 1 or not 1 <= top_k <= n_experts:
            raise PredictorError(
                f"a predictor needs layers and experts, got {n_layers} layers, {top_k} of {n_experts} experts"
            )
        self.n_layers, self.n_experts, self.top_k = n_layers, n_experts, top_k
        self._state = self.make_state(n_layers, n_experts, top_k)

    @property
    def nbytes(self) -> int:
        """Bytes that it may take in the end: pages of tables are committed as they fill."""
        return 0 if self._state is None else sum(value.nbytes for value in self._state)

    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of what it has learned and observed, for a warm start."""
        return {name: np.array(value) for name, value in self._state._asdict().items()}

    def load_state(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take back what `state` gave. Raises PredictorError for arrays of another predictor or shape, or such as it
        would never give, and then changes nothing."""
        if wrong := load_state(self._state._asdict(), arrays, self.limits()):
            raise PredictorError(f"saved state does not fit predictor {self.name!r} ({wrong})")

    def limits(self) -> dict[str, Limits]:
        """Least and largest values of the arrays of the state that are used as indices."""
        return {}
