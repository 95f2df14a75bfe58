"""Policies that were trained, and their file; see storage/trained.py for the format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.errors import PolicyError
from flashmoe.storage.trained import TrainedFile


@dataclass(frozen=True)
class PolicyFile(TrainedFile):
    """A trained policy (kind: flashmoe or flashmoe+) as stored."""

    features: list[str]  # their order, as the networks were trained with

    noun: ClassVar[str] = "policy"
    error: ClassVar[type[PolicyError]] = PolicyError
    command: ClassVar[str] = "flashmoe train policy"
    instead: ClassVar[str] = "lfu-aged"
    elsewhere: ClassVar[str] = "a predictor's file belongs after --prefetch"
    parts: ClassVar[Mapping[str, type]] = {"features": list, **TrainedFile.parts}

    def check_shape(self, n_layers: int, n_experts: int) -> None:
        """Raise PolicyError where this policy is for a model of another shape."""
        if (n_layers, n_experts) != (self.n_layers, self.n_experts):
            raise PolicyError(
                f"the policy was trained for {self.model.get('name', 'a model')} ({self.n_layers} layers of "
                f"{self.n_experts} experts), this model has {n_layers} of {n_experts}: train one for it with "
                f"`{self.command}`, or use {self.instead}"
            )


class LearnedPolicy(EvictionPolicy):
    """A policy made from a trained file."""

    needs_file = True
    weights: dict[str, NDArray[Any]]

    def __init__(self, file: str | Path | None = None, trained: PolicyFile | None = None) -> None:
        super().__init__()
        if trained is None:
            if file is None:
                raise PolicyError(
                    f"policy {self.name!r} needs a trained file: write {self.name}:FILE, or train one with "
                    f"`flashmoe train policy TRACE -o FILE --kind {self.name}`"
                )
            trained = PolicyFile.load(file, self.name)
        self.trained = trained

    def check_model(self, model: Mapping[str, Any]) -> None:
        self.trained.check_model(model)
