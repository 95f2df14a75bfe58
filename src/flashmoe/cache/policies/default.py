"""The default eviction policy of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashmoe.cache.policies import create
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.policies.learned import PolicyFile
from flashmoe.cache.remembered import Remembered
from flashmoe.common.plugins import DEFAULT
from flashmoe.storage.hub import DEMO, default_policy


def default_for(model: Mapping[str, Any]) -> str:
    """The spec that the model of this identity (of a trace, or of a catalog) runs with by default."""
    return Remembered(model).trained() or untaught_default(model)


def untaught_default(model: Mapping[str, Any]) -> str:
    """The same where `flashmoe learn` has made nothing: what is bundled with the demo model, or what all have."""
    spec = default_policy(DEMO)
    kind, _, file = spec.partition(":")
    telling = "tensors_sha256"
    if file and telling in model and PolicyFile.load(file, kind).model.get(telling) == model[telling]:
        return spec
    return default_policy("")


def create_for(spec: str, model: Mapping[str, Any], n_layers: int, n_experts: int) -> EvictionPolicy:
    """`create`, which also knows `default`: as the next start of the model of this identity would be.

    Raises PolicyError as `create` does, and where a policy was made for another model.
    """
    policy = create(default_for(model) if spec == DEFAULT else spec)
    policy.check_model(model)
    if spec == DEFAULT:
        Remembered(model).recall(policy, n_layers, n_experts)
    return policy
