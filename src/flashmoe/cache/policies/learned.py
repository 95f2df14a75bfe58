"""The file of a trained policy: one `.safetensors`, no pickle.

Metadata: format, version, kind (flashmoe or flashmoe+), and as JSON: shape (layers, experts, top_k), features
(their order, as the networks were trained with), constants, model (whose routing it learned), trained_on,
report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.errors import PolicyError
from flashmoe.storage.arrays import read_safetensors
from flashmoe.storage.files import write_atomically

FORMAT = "flashmoe-policy"
VERSION = "1"


@dataclass(frozen=True)
class PolicyFile:
    """A trained policy as stored."""

    kind: str
    arrays: dict[str, NDArray[Any]]
    n_layers: int
    n_experts: int
    top_k: int
    features: list[str]
    constants: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    trained_on: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises PolicyError where the place cannot be written."""
        shape = {"layers": self.n_layers, "experts": self.n_experts, "top_k": self.top_k}
        parts = {
            "shape": shape,
            "features": self.features,
            "constants": self.constants,
            "model": self.model,
            "trained_on": self.trained_on,
            "report": self.report,
        }
        metadata = {"format": FORMAT, "version": VERSION, "kind": self.kind}
        metadata |= {name: json.dumps(value, sort_keys=True) for name, value in parts.items()}
        try:
            write_atomically(Path(path), save(self.arrays, metadata))
        except OSError as error:
            raise PolicyError(f"cannot write {path}: {error.strerror}; choose another place") from None

    @classmethod
    def load(cls, path: str | Path, kind: str) -> PolicyFile:
        """Read a policy of a kind. Raises PolicyError where it is missing, damaged, or of another kind."""
        if not Path(path).is_file():
            raise PolicyError(f"policy file {path} does not exist: train one with `flashmoe train policy`")
        try:
            metadata, arrays = read_safetensors(path)
        except (OSError, ValueError) as error:
            raise PolicyError(f"policy file {path} is damaged ({error}): train it again") from None
        if metadata.get("format") != FORMAT:
            raise PolicyError(f"{path} is no policy file: give one made by `flashmoe train policy`")
        if metadata.get("version") != VERSION:
            raise PolicyError(
                f"policy file {path} has version {metadata.get('version')}, not {VERSION}: train it again"
            )
        if metadata.get("kind") != kind:
            other = metadata.get("kind")
            raise PolicyError(f"{path} holds a policy {other!r}, not {kind!r}: write {other}:{path}")
        try:
            shape = json.loads(metadata["shape"])
            rest = {
                n: json.loads(metadata[n]) for n in ("features", "constants", "model", "trained_on", "report")
            }
            sizes = [int(shape[name]) for name in ("layers", "experts", "top_k")]
            if min(sizes) < 1 or sizes[2] > sizes[1]:
                raise ValueError(f"shape {shape}")
            if not all(isinstance(rest[n], dict) for n in rest if n != "features"):
                raise ValueError("not an object")
            return cls(kind, arrays, sizes[0], sizes[1], sizes[2], **rest)
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise PolicyError(f"policy file {path} has damaged metadata ({error}): train it again") from None

    def array(self, name: str, *shape: int) -> NDArray[np.float32]:
        """An array of a given shape as float32. Raises PolicyError where it is absent or of another shape."""
        value = self.arrays.get(name)
        if value is None or value.shape != shape or not np.isfinite(value.astype(np.float32)).all():
            found = "absent" if value is None else f"{list(value.shape)}"
            raise PolicyError(
                f"policy file is damaged: {name} should be {list(shape)}, is {found}; train it again"
            )
        return np.ascontiguousarray(value, np.float32)

    def check_shape(self, n_layers: int, n_experts: int) -> None:
        """Raise PolicyError where this policy is for a model of another shape."""
        if (n_layers, n_experts) != (self.n_layers, self.n_experts):
            raise PolicyError(
                f"the policy was trained for {self.model.get('name', 'a model')} ({self.n_layers} layers of "
                f"{self.n_experts} experts), this model has {n_layers} of {n_experts}: train one for it with "
                "`flashmoe train policy`, or use lfu-aged"
            )

    def check_model(self, model: Mapping[str, Any]) -> None:
        """Raise PolicyError where both models are known by their tensors and differ."""
        own, other = self.model.get("tensors_sha256"), model.get("tensors_sha256")
        names = self.model.get("architecture"), model.get("architecture")
        if (own and other and own != other) or (all(names) and names[0] != names[1]):
            raise PolicyError(
                f"the policy was trained for {self.model.get('name', 'another model')}, not for "
                f"{model.get('name', 'this model')}: train one with `flashmoe train policy`, or use lfu-aged"
            )


class LearnedPolicy(EvictionPolicy):
    """A policy made from a trained file."""

    weights: dict[str, NDArray[np.float32]]

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
        """See EvictionPolicy."""
        self.trained.check_model(model)

    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of what it has observed; the networks stay in their file."""
        return {name: value for name, value in super().state().items() if name not in self.weights}

    def load_state(self, arrays: dict[str, NDArray[Any]]) -> None:
        """See EvictionPolicy."""
        super().load_state({**arrays, **self.weights})
