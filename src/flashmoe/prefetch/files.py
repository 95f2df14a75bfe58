"""The file of a trained predictor; see storage/trained.py for the format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flashmoe.prefetch.base import PredictorError
from flashmoe.storage.trained import TrainedFile


@dataclass(frozen=True)
class PredictorFile(TrainedFile):
    """A trained predictor (kind: table or promoe) as stored."""

    noun: ClassVar[str] = "predictor"
    error: ClassVar[type[PredictorError]] = PredictorError
    command: ClassVar[str] = "flashmoe train prefetch"
    instead: ClassVar[str] = "table without a file"
    elsewhere: ClassVar[str] = "a policy's file belongs after --policy"

    def check_shape(self, n_layers: int, n_experts: int, top_k: int) -> None:
        """Raise PredictorError where this predictor is for a model of another shape."""
        if (n_layers, n_experts, top_k) != (self.n_layers, self.n_experts, self.top_k):
            raise PredictorError(
                f"the predictor was trained for {self.model.get('name', 'a model')} ({self.n_layers} layers, "
                f"{self.top_k} of {self.n_experts} experts), this model has {n_layers} layers, {top_k} of "
                f"{n_experts}: train one for it with `{self.command}`, or use {self.instead}"
            )
