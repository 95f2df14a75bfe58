"""The file of a trained predictor: one `.safetensors`, no pickle.

Metadata: format, version, kind (table, promoe), and as JSON: shape (layers, experts, top_k), constants, model
(whose routing it learned), trained_on, report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from flashmoe.prefetch.base import PredictorError
from flashmoe.storage.arrays import read_safetensors
from flashmoe.storage.files import write_atomically

FORMAT = "flashmoe-predictor"
VERSION = "1"


@dataclass(frozen=True)
class PredictorFile:
    """A trained predictor as stored, for L layers of E experts, k per token."""

    kind: str
    arrays: dict[str, NDArray[Any]]
    n_layers: int
    n_experts: int
    top_k: int
    constants: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    trained_on: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises PredictorError where the place cannot be written."""
        parts: dict[str, Any] = {
            "shape": {"layers": self.n_layers, "experts": self.n_experts, "top_k": self.top_k},
            "constants": self.constants,
            "model": self.model,
            "trained_on": self.trained_on,
            "report": self.report,
        }
        metadata = {"format": FORMAT, "version": VERSION, "kind": self.kind}
        metadata |= {name: json.dumps(value, sort_keys=True) for name, value in parts.items()}
        try:
            arrays = {name: np.ascontiguousarray(value) for name, value in self.arrays.items()}
            write_atomically(Path(path), save(arrays, metadata))
        except OSError as error:
            raise PredictorError(f"cannot write {path}: {error.strerror}; choose another place") from None

    @classmethod
    def load(cls, path: str | Path, kind: str) -> PredictorFile:
        """Read a predictor of a kind. Raises PredictorError where it is missing, damaged, or of another kind."""
        if not Path(path).is_file():
            raise PredictorError(
                f"predictor file {path} does not exist: train one with `flashmoe train prefetch`"
            )
        try:
            metadata, arrays = read_safetensors(path)
        except (OSError, ValueError) as error:
            raise PredictorError(f"predictor file {path} is damaged ({error}): train it again") from None
        if metadata.get("format") != FORMAT:
            raise PredictorError(
                f"{path} is no predictor file: give one made by `flashmoe train prefetch` (a policy's file "
                "belongs after --policy)"
            )
        if metadata.get("version") != VERSION:
            raise PredictorError(
                f"predictor file {path} has version {metadata.get('version')}, not {VERSION}: train it again"
            )
        if metadata.get("kind") != kind:
            other = metadata.get("kind")
            raise PredictorError(f"{path} holds a predictor {other!r}, not {kind!r}: write {other}:{path}")
        try:
            shape, *rest = (
                dict(json.loads(metadata[name]))
                for name in ("shape", "constants", "model", "trained_on", "report")
            )
            sizes = [int(shape[name]) for name in ("layers", "experts", "top_k")]
            if min(sizes) < 1 or sizes[2] > sizes[1]:
                raise ValueError(f"shape {shape}")
            return cls(kind, arrays, sizes[0], sizes[1], sizes[2], *rest)
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise PredictorError(
                f"predictor file {path} has damaged metadata ({error}): train it again"
            ) from None

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """An array of a given shape and type; floats must be finite. Raises PredictorError else."""
        value = self.arrays.get(name)
        fits = value is not None and value.shape == shape
        if not fits or value is None or (value.dtype.kind == "f" and not np.isfinite(value).all()):
            found = "absent" if value is None else f"{list(value.shape)} or not finite"
            raise PredictorError(
                f"predictor file is damaged: {name} should be {list(shape)}, is {found}; train it again"
            )
        return np.ascontiguousarray(value, dtype)

    def check_shape(self, n_layers: int, n_experts: int, top_k: int) -> None:
        """Raise PredictorError where this predictor is for a model of another shape."""
        if (n_layers, n_experts, top_k) != (self.n_layers, self.n_experts, self.top_k):
            raise PredictorError(
                f"the predictor was trained for {self.model.get('name', 'a model')} ({self.n_layers} layers, "
                f"{self.top_k} of {self.n_experts} experts), this model has {n_layers} layers, {top_k} of "
                f"{n_experts}: train one for it with `flashmoe train prefetch`, or use table without a file"
            )

    def check_model(self, model: Mapping[str, Any]) -> None:
        """Raise PredictorError where both models are known by their tensors or architecture and differ."""
        own, other = self.model.get("tensors_sha256"), model.get("tensors_sha256")
        names = self.model.get("architecture"), model.get("architecture")
        if (own and other and own != other) or (all(names) and names[0] != names[1]):
            raise PredictorError(
                f"the predictor was trained for {self.model.get('name', 'another model')}, not for "
                f"{model.get('name', 'this model')}: train one with `flashmoe train prefetch`, or use table "
                "without a file"
            )
