"""The file of something trained on routing (a policy, a predictor): one `.safetensors`, no pickle.

Metadata: format, version, kind (the policy's or predictor's name), and as JSON: shape (layers, experts, top_k) and the
`parts` of the class."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from flashmoe.common.files import write_atomically
from flashmoe.errors import FlashMoEError
from flashmoe.storage.arrays import read_safetensors
from flashmoe.storage.catalog import same_model

if TYPE_CHECKING:
    from typing_extensions import Self

VERSION = "1"


@dataclass(frozen=True)
class TrainedFile:
    """What was trained, as stored: arrays by name, for L layers of E experts, k per token."""

    kind: str
    arrays: dict[str, NDArray[Any]]
    n_layers: int
    n_experts: int
    top_k: int
    constants: dict[str, Any] = field(default_factory=dict, kw_only=True)
    model: dict[str, Any] = field(default_factory=dict, kw_only=True)  # whose routing it learned
    trained_on: dict[str, Any] = field(default_factory=dict, kw_only=True)
    report: dict[str, Any] = field(default_factory=dict, kw_only=True)

    # What subclasses give: "policy" or "predictor", and words for messages
    noun: ClassVar[str]
    error: ClassVar[type[FlashMoEError]]
    command: ClassVar[str]
    instead: ClassVar[str]  # what needs no file
    elsewhere: ClassVar[str]  # where the other noun's files belong
    parts: ClassVar[Mapping[str, type]] = dict.fromkeys(("constants", "model", "trained_on", "report"), dict)

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises `error` where the place cannot be written."""
        parts = {name: getattr(self, name) for name in self.parts}
        parts["shape"] = {"layers": self.n_layers, "experts": self.n_experts, "top_k": self.top_k}
        metadata = {"format": f"flashmoe-{self.noun}", "version": VERSION, "kind": self.kind}
        metadata |= {name: json.dumps(value, sort_keys=True) for name, value in parts.items()}
        arrays = {name: np.asarray(value, order="C") for name, value in self.arrays.items()}
        try:
            write_atomically(Path(path), save(arrays, metadata))
        except OSError as error:
            raise self.error(f"cannot write {path}: {error.strerror}; choose another place") from None

    @classmethod
    def load(cls, path: str | Path, kind: str) -> Self:
        """Read one of a kind. Raises `error` where it is missing, damaged, or of another kind."""
        if not Path(path).is_file():
            raise cls.error(f"{cls.noun} file {path} does not exist: train one with `{cls.command}`")
        try:
            metadata, arrays = read_safetensors(path)
        except (OSError, ValueError) as error:
            raise cls.error(f"{cls.noun} file {path} is damaged ({error}): train it again") from None
        if metadata.get("format") != f"flashmoe-{cls.noun}":
            raise cls.error(
                f"{path} is no {cls.noun} file: give one made by `{cls.command}` ({cls.elsewhere})"
            )
        if metadata.get("version") != VERSION:
            raise cls.error(
                f"{cls.noun} file {path} has version {metadata.get('version')}, not {VERSION}: train it again"
            )
        if metadata.get("kind") != kind:
            other = metadata.get("kind")
            raise cls.error(f"{path} holds a {cls.noun} {other!r}, not {kind!r}: write {other}:{path}")
        try:
            shape = json.loads(metadata["shape"])
            sizes = [int(shape[name]) for name in ("layers", "experts", "top_k")]
            if min(sizes) < 1 or sizes[2] > sizes[1]:
                raise ValueError(f"shape {shape}")
            parts = {name: make(json.loads(metadata[name])) for name, make in cls.parts.items()}
            return cls(kind, arrays, *sizes, **parts)
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise cls.error(
                f"{cls.noun} file {path} has damaged metadata ({error}): train it again"
            ) from None

    def array(self, name: str, *shape: int) -> NDArray[np.float32]:
        """An array of a given shape as float32, all finite. Raises `error` else."""
        value = self.arrays.get(name)
        if value is None or value.shape != shape or not np.isfinite(value.astype(np.float32)).all():
            found = "absent" if value is None else f"{list(value.shape)} or not finite"
            raise self.error(
                f"{self.noun} file is damaged: {name} should be {list(shape)}, is {found}; train it again"
            )
        return np.ascontiguousarray(value, np.float32)

    def check_model(self, model: Mapping[str, Any]) -> None:
        """Raise `error` where this is for another model than the identity `model` says; see `same_model`."""
        if not same_model(self.model, model):
            own, other = self.model.get("name", "another model"), model.get("name", "this model")
            which = f"{own}, not for {other}" if own != other else f"another version of {own}"
            raise self.error(
                f"the {self.noun} was trained for {which}: train one with `{self.command}`, or use {self.instead}"
            )
