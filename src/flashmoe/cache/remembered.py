"""What is remembered of a model between sessions: what `online` has learnt, a history of routing, and what
`flashmoe learn` has made of it.

All are numbers about experts, in a folder of the model's own in the user's cache folder; only the user can read the
files. No text, no token ids; but routing follows the text: with the model, one could guess at it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.policies.learned import PolicyFile
from flashmoe.common.files import cache_folder, write_atomically
from flashmoe.errors import PolicyError, TraceError, warn
from flashmoe.routing.files import merge
from flashmoe.routing.trace import RoutingTrace
from flashmoe.storage.arrays import read_safetensors

MOST_BYTES = 16 << 20  # of the history's expert ids: 43,690 tokens of 48 layers, top-8 of up to 128 experts
KIND = "flashmoe+"  # that is trained
WITH = "adaptive"  # of which it is a member
FORMAT = "flashmoe-learnt"
VERSION = "1"


def folder() -> Path:
    """Of what is remembered, of all models."""
    return cache_folder() / "learnt"


def nbytes() -> int:
    """That it takes on the drive."""
    return sum(path.stat().st_size for path in folder().rglob("*") if path.is_file())


class Remembered:
    """What is remembered of one model. Files that are damaged mean a warning, and a start from nothing."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        """model: its identity. One training of a model is one, whatever its quantisation."""
        telling = (
            model.get("router_sha256")
            or model.get("tensors_sha256")
            or json.dumps(dict(model), sort_keys=True)
        )
        name = hashlib.sha256(f"{model.get('architecture')} {telling}".encode()).hexdigest()[:16]
        self.model = dict(model)
        self.folder = folder() / name

    @property
    def policy(self) -> Path:
        """Where `flashmoe learn` puts a `flashmoe+` that it has found better."""
        return self.folder / "policy.safetensors"

    def trained(self) -> str:
        """The spec of the policy that has it as a member; "" where there is none that can be used."""
        if not self.policy.exists():
            return ""
        try:
            PolicyFile.load(self.policy, KIND).check_model(self.model)
        except PolicyError as error:
            warn(f"{error}; it is left out", 3)
            return ""
        return f"{WITH}:{self.policy}"

    @property
    def _weights(self) -> Path:
        return self.folder / "online.safetensors"

    @property
    def _routing(self) -> Path:
        return self.folder / "routing.safetensors"

    def recall(self, policy: EvictionPolicy, n_layers: int, n_experts: int) -> None:
        """Let a policy that is to be bound go on from what it learnt in earlier sessions, if there is anything."""
        if not policy.learns or not self._weights.exists():
            return
        try:
            metadata, arrays = read_safetensors(self._weights)
            if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
                raise ValueError("not of this version")
            policy.recall(arrays)
            policy.make_state(n_layers, n_experts)
        except (OSError, ValueError, PolicyError) as error:
            policy.recall({})
            warn(f"{self._weights}: cannot be used ({error}): learning begins anew", 3)

    def keep(self, policy: EvictionPolicy) -> None:
        """Write what a policy has learnt for the next session. A failure is a warning."""
        if not policy.learns:
            return
        learnt = policy.learnt()
        metadata = {"format": FORMAT, "version": VERSION, "model": json.dumps(self.model, sort_keys=True)}
        self._write(self._weights, save({n: np.ascontiguousarray(a) for n, a in learnt.items()}, metadata))

    def history(self) -> RoutingTrace | None:
        """The routing of earlier sessions, the newest of it; None where there is none."""
        if not self._routing.exists():
            return None
        try:
            return RoutingTrace.load(self._routing)
        except TraceError as error:
            warn(f"{error}: the history begins anew", 3)
            return None

    def add_history(self, ids: NDArray[np.int16], sequences: NDArray[np.int32], n_experts: int) -> None:
        """Put the routing of a session, [T, L, k] and [T], behind that of earlier ones. A failure is a warning."""
        new = RoutingTrace(ids, n_experts, sequence_id=sequences, model=self.model)
        before = self.history()
        try:
            whole = merge([replace(before, model=new.model), new]) if before else new
        except TraceError:  # a file of another shape
            whole = new
        most = MOST_BYTES // (new.n_layers * new.top_k * (1 if n_experts <= 128 else 2))
        if whole.n_tokens > most:
            whole = whole.rows(np.arange(whole.n_tokens - most, whole.n_tokens))
        self._write(self._routing, whole.as_bytes())

    def forget(self) -> bool:
        """Delete all of it; whether there was any. Raises OSError where it cannot be deleted."""
        there = self.folder.exists()
        if there:
            shutil.rmtree(self.folder)
        return there

    def _write(self, path: Path, data: bytes) -> None:
        try:
            write_atomically(path, data, private=True)
        except OSError as error:
            warn(f"{path}: cannot be written ({error.strerror}): the next session will not know it", 3)
