"""What a session leaves to the next one: residents, and what the policy and the predictors have learned.

One `.safetensors` file per model and policy, which may be lost at any time. What it says is checked before it is used:
a file that is damaged or of something else means a warning and a cold start.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.saved import load_state
from flashmoe.common.files import cache_folder, expanded, write_atomically
from flashmoe.errors import FlashMoEError, PolicyError, warn
from flashmoe.prefetch import Predictor, PredictorError
from flashmoe.storage.arrays import read_safetensors
from flashmoe.storage.catalog import ExpertCatalog

FORMAT = "flashmoe-cache"
VERSION = "1"
_MOST_STEPS = 1 << 60
_POLICY, _PREDICTOR = "policy.", "predictor."

Arrays = dict[str, NDArray[Any]]


class Session:
    """The file of a model and a policy. `restore` before the first token, `save` after the last."""

    def __init__(
        self,
        place: bool | str | Path,
        catalog: ExpertCatalog,
        policy: EvictionPolicy,
        predictors: Sequence[Predictor],
    ) -> None:
        """place: the file, or True for one of this model's own in the user's cache folder."""
        self._catalog, self._policy, self._predictors = catalog, policy, predictors
        self._metadata = {
            "format": FORMAT,
            "version": VERSION,
            "model": json.dumps(catalog.identity, sort_keys=True),
            "policy": policy.name,
        }
        if isinstance(place, bool):
            name = hashlib.sha256(self._metadata["model"].encode()).hexdigest()[:16]
            self.path = cache_folder() / "sessions" / f"{name}-{policy.name}.safetensors"
        else:
            self.path = expanded(place)
        self._began = 0

    def restore(self) -> NDArray[np.int32] | None:
        """Give policy and predictors their state back; the residents to read again, best first, int32 [L, E] and -1.

        None for a cold start: there is no file, or, with a warning, none that fits.
        """
        if not self.path.exists():
            return None
        try:
            metadata, arrays = read_safetensors(self.path)
            self._check(metadata)
            ranked = self._restore(arrays)
        except (OSError, ValueError) as error:
            why = f"the saved cache is damaged ({error})"
        except FlashMoEError as error:
            why = str(error)
        else:
            self._began = int(self._policy.residency.step[0])
            return ranked
        warn(f"{self.path}: {why}: starting cold; the file is replaced at the end", 3)
        return None

    def save(self) -> None:
        """Write the file, whole or not at all, if anything was asked for since. A failure is a warning."""
        residency = self._policy.residency
        if residency.step[0] == self._began:
            return
        arrays = {"experts": self._policy.ranking(), "step": residency.step, "accesses": residency.accesses}
        arrays |= {_POLICY + name: value for name, value in self._policy.state().items()}
        for predictor in self._predictors:
            arrays |= {_of(predictor) + name: value for name, value in predictor.state().items()}
        try:
            data = save({name: np.ascontiguousarray(value) for name, value in arrays.items()}, self._metadata)
            write_atomically(self.path, data, private=True)
        except OSError as error:
            warn(
                f"{self.path}: the cache could not be saved ({error.strerror}): the next start will not know it",
                3,
            )

    def _check(self, metadata: Mapping[str, str]) -> None:
        if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
            raise FlashMoEError("no saved cache of this version")
        for key, what in (("model", "another model"), ("policy", "another policy")):
            if metadata.get(key) != self._metadata[key]:
                raise FlashMoEError(f"the cache of {what}")

    def _restore(self, arrays: Arrays) -> NDArray[np.int32]:
        ranked = self._ranked(arrays)
        residency = self._policy.residency
        clocks = {"step": residency.step, "accesses": residency.accesses}
        if wrong := load_state(clocks, arrays, dict.fromkeys(clocks, (0, _MOST_STEPS))):
            raise ValueError(wrong)
        try:
            self._policy.load_state(_starting(arrays, _POLICY))
        except PolicyError:
            residency.step[:] = residency.accesses[:] = 0
            raise
        for predictor in self._predictors:
            mine = _starting(arrays, _of(predictor))
            try:
                if mine:
                    predictor.load_state(mine)
            except PredictorError as error:
                warn(f"{self.path}: {error}: it starts cold", 3)
        return ranked

    def _ranked(self, arrays: Arrays) -> NDArray[np.int32]:
        """The residents, each of which must exist, once."""
        ranked = np.empty_like(self._policy.residency.slot_of)
        if wrong := load_state({"experts": ranked}, arrays, {"experts": (-1, ranked.shape[1] - 1)}):
            raise ValueError(wrong)
        for layer, row in zip(self._catalog.layers, ranked, strict=True):
            experts = row[row >= 0]
            if (experts >= layer.n_experts).any() or len(np.unique(experts)) < len(experts):
                raise ValueError(f"experts of block {layer.block}")
        return ranked


def _of(predictor: Predictor) -> str:
    return f"{_PREDICTOR}{predictor.name}."


def _starting(arrays: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
