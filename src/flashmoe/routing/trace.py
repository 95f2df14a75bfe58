"""The routing trace: which experts each token asked for, in each MoE layer.

One `.safetensors` file, readable without FlashMoE. T tokens, L MoE layers, k experts per token:

    expert_ids      int8 or int16 [T, L, k]  experts; -1 where a layer did not see the token (llama.cpp
                    computes the last
                                             layer of a prompt only for the tokens whose output is wanted)
    router_weights  float16 [T, L, k]        weights of these experts; optional
    ranked_ids      int8 or int16 [T, L, 2k] the experts that the router has ranked best, the best first; -1 where that
                                             was not recorded (prompts); optional
    ranked_scores   float16 [T, L, 2k]       logarithms of their scores, less the best one's
    score_range     float16 [T, L]           range of the logarithms of all experts' scores
    token_id        int32 [T]                token, -1 where unknown
    sequence_id     int32 [T]                prompt or conversation; the tokens of one lie together
    phase           uint8 [T]                0 decode, 1 prefill
    step            int32 [T]                tokens that were routed in one micro-batch share a number; never
                    falls

Metadata: format, version, num_experts, first_moe_layer, model (JSON: whose routing this is).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from flashmoe.common.files import write_atomically
from flashmoe.errors import TraceError
from flashmoe.storage.arrays import read_safetensors
from flashmoe.storage.catalog import MAX_EXPERTS

DECODE, PREFILL = 0, 1
FORMAT = "flashmoe-routing-trace"
VERSION = "1"


@dataclass(frozen=True)
class RoutingTrace:
    """A routing trace in memory: the arrays of the file (see the module), checked when made.

    Raises TraceError where the arrays are empty, contradict each other, or hold experts out of range.
    """

    expert_ids: NDArray[Any]  # [T, L, k]
    num_experts: int
    token_id: NDArray[Any] = field(default_factory=lambda: np.zeros(0, np.int32))  # [T]; -1 if omitted
    sequence_id: NDArray[Any] = field(default_factory=lambda: np.zeros(0, np.int32))  # [T]; 0
    phase: NDArray[Any] = field(default_factory=lambda: np.zeros(0, np.uint8))  # [T]; DECODE
    step: NDArray[Any] = field(default_factory=lambda: np.zeros(0, np.int32))  # [T]; one token each
    router_weights: NDArray[Any] | None = None  # [T, L, k]
    ranked_ids: NDArray[Any] | None = None  # [T, L, 2k]
    ranked_scores: NDArray[Any] | None = None  # [T, L, 2k]
    score_range: NDArray[Any] | None = None  # [T, L]
    first_moe_layer: int = 0
    model: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = self.expert_ids
        if ids.ndim != 3 or 0 in ids.shape:
            raise TraceError(
                f"the trace is empty or has no [tokens, layers, k] shape: {list(ids.shape)}; record it again"
            )
        if not np.issubdtype(ids.dtype, np.integer):
            raise TraceError(f"expert ids must be integers, got {ids.dtype}")
        if not 0 < self.num_experts <= MAX_EXPERTS:
            raise TraceError(
                f"a trace of {self.num_experts} experts per layer; at most {MAX_EXPERTS} are possible"
            )
        if ids.max() >= self.num_experts or ids.min() < -1:
            raise TraceError(
                f"the trace has experts {int(ids.min())}..{int(ids.max())}, "
                f"but its model has 0..{self.num_experts - 1}: it is damaged, or of another model"
            )
        n = len(ids)
        defaults: dict[str, NDArray[Any]] = {
            "token_id": np.full(n, -1, np.int32),
            "sequence_id": np.zeros(n, np.int32),
            "phase": np.zeros(n, np.uint8),
            "step": np.arange(n, dtype=np.int32),
        }
        object.__setattr__(self, "expert_ids", np.ascontiguousarray(ids, np.int16))
        for name, default in defaults.items():
            value = getattr(self, name)
            value = default if value.size == 0 else value
            if value.shape != (n,):
                raise TraceError(f"{name} has shape {list(value.shape)}, but the trace has {n} tokens")
            known = np.iinfo(default.dtype)
            if value.dtype.kind not in "iu" or value.min() < known.min or value.max() > known.max:
                raise TraceError(f"{name} must be integers of {known.bits} bits; record the trace again")
            object.__setattr__(self, name, np.ascontiguousarray(value, default.dtype))
        if self.router_weights is not None:
            if self.router_weights.shape != ids.shape or self.router_weights.dtype.kind != "f":
                raise TraceError(
                    f"router weights {self.router_weights.dtype} {list(self.router_weights.shape)} do not match "
                    f"{list(ids.shape)}"
                )
            object.__setattr__(self, "router_weights", np.ascontiguousarray(self.router_weights, np.float16))
        self._check_ranking()
        if (np.diff(self.step) < 0).any():
            raise TraceError("the steps of the trace are out of order; record it again")

    def _check_ranking(self) -> None:
        """All of it or nothing, and of the right shapes."""
        ids, scores, ranges = self.ranked_ids, self.ranked_scores, self.score_range
        if ids is None and scores is None and ranges is None:
            return
        rows = self.expert_ids.shape[:2]
        if ids is None or scores is None or ranges is None or ids.ndim != 3 or ids.shape != scores.shape:
            raise TraceError("the trace's ranking of experts is incomplete; record it again")
        if ids.shape[:2] != rows or ranges.shape != rows or ids.dtype.kind not in "iu" or ids.size == 0:
            raise TraceError("the trace's ranking of experts does not match its tokens; record it again")
        numbers = [scores.astype(np.float64), ranges.astype(np.float64)]
        if ids.max() >= self.num_experts or ids.min() < -1 or not all(np.isfinite(n).all() for n in numbers):
            raise TraceError("the trace's ranking of experts is damaged; record it again")
        object.__setattr__(self, "ranked_ids", np.ascontiguousarray(ids, np.int16))
        object.__setattr__(self, "ranked_scores", np.ascontiguousarray(scores, np.float16))
        object.__setattr__(self, "score_range", np.ascontiguousarray(ranges, np.float16))

    # Shape ------------------------------------------------------------------------------------------------

    @property
    def n_tokens(self) -> int:
        """T."""
        return int(self.expert_ids.shape[0])

    @property
    def n_layers(self) -> int:
        """L, MoE layers."""
        return int(self.expert_ids.shape[1])

    @property
    def top_k(self) -> int:
        """Experts per token and layer."""
        return int(self.expert_ids.shape[2])

    @property
    def layer_top_k(self) -> NDArray[np.int64]:
        """Experts per token of each layer, [L]; what no token was routed by counts as 1."""
        return np.maximum((self.expert_ids >= 0).sum(axis=2).max(axis=0), 1)

    @property
    def n_sequences(self) -> int:
        """Number of sequences."""
        return int(self.begins().sum())

    def begins(self) -> NDArray[np.bool_]:
        """[T] True at the first token of each sequence."""
        return np.r_[True, self.sequence_id[1:] != self.sequence_id[:-1]]

    def steps(self) -> NDArray[np.int64]:
        """Offsets int64 [N+1] of the N steps; a new sequence always begins a new step."""
        begins = np.r_[True, self.step[1:] != self.step[:-1]] | self.begins()
        return np.r_[np.flatnonzero(begins), self.n_tokens].astype(np.int64)

    def starts(self, cold: bool = False) -> NDArray[np.uint8]:
        """Per step uint8 [N]: 1 (2 with `cold`) where a sequence begins, else 0. For
        EvictionPolicy.replay."""
        return self.begins()[self.steps()[:-1]].astype(np.uint8) * (2 if cold else 1)

    def rows(self, keep: NDArray[Any]) -> RoutingTrace:
        """The tokens chosen by a mask or an ascending index array, as a trace of their own."""
        if len(self.token_id[keep]) == 0:
            raise TraceError("no token of the trace is left: choose other sequences")
        optional = ("router_weights", "ranked_ids", "ranked_scores", "score_range")
        kept = {name: getattr(self, name)[keep] for name in optional if getattr(self, name) is not None}
        return replace(
            self,
            expert_ids=self.expert_ids[keep],
            token_id=self.token_id[keep],
            sequence_id=self.sequence_id[keep],
            phase=self.phase[keep],
            step=self.step[keep],
            **kept,
        )

    def check_model(self, n_layers: int, n_experts: int) -> None:
        """Raise TraceError where this is not a trace of a model of L layers with E experts."""
        if (self.n_layers, self.num_experts) != (n_layers, n_experts):
            raise TraceError(
                f"the trace has {self.n_layers} layers of {self.num_experts} experts, "
                f"the model {n_layers} of {n_experts}: "
                "record a trace with this model"
            )

    # File -------------------------------------------------------------------------------------------------

    def as_bytes(self) -> bytes:
        """The file's content."""
        ids = self.expert_ids.astype(np.int8) if self.num_experts <= 128 else self.expert_ids
        arrays: dict[str, NDArray[Any]] = {
            "expert_ids": ids,
            "token_id": self.token_id,
            "sequence_id": self.sequence_id,
            "phase": self.phase,
            "step": self.step,
        }
        if self.router_weights is not None:
            arrays["router_weights"] = self.router_weights
        if self.ranked_ids is not None and self.ranked_scores is not None and self.score_range is not None:
            arrays["ranked_ids"] = self.ranked_ids.astype(ids.dtype)
            arrays |= {"ranked_scores": self.ranked_scores, "score_range": self.score_range}
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "num_experts": str(self.num_experts),
            "first_moe_layer": str(self.first_moe_layer),
            "model": json.dumps(dict(self.model), sort_keys=True),
        }
        return save(arrays, metadata)

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises TraceError where the place cannot be written."""
        try:
            write_atomically(Path(path), self.as_bytes())
        except OSError as error:
            raise TraceError(f"cannot write {path}: {error.strerror}; choose another place") from None

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Read a trace file. Raises TraceError where it is missing, truncated, of another format, or
        inconsistent."""
        if not Path(path).is_file():
            raise TraceError(f"trace {path} does not exist: record one with `flashmoe trace record`")
        try:
            metadata, arrays = read_safetensors(path)
        except (OSError, ValueError) as error:
            raise TraceError(
                f"trace {path} is damaged or no .safetensors file ({error}): record it again, or import it "
                "with `flashmoe trace import`"
            ) from None
        if metadata.get("format") != FORMAT or "expert_ids" not in arrays:
            raise TraceError(
                f"{path} is a .safetensors file, but no routing trace: give a file of `flashmoe trace record`"
            )
        if metadata.get("version") != VERSION:
            raise TraceError(
                f"trace {path} has version {metadata.get('version')}, this program reads {VERSION}: update it"
            )
        try:
            known = (
                "token_id",
                "sequence_id",
                "phase",
                "step",
                "router_weights",
                "ranked_ids",
                "ranked_scores",
                "score_range",
            )
            return cls(
                expert_ids=arrays["expert_ids"],
                num_experts=int(metadata["num_experts"]),
                first_moe_layer=int(metadata.get("first_moe_layer", "0")),
                model=dict(json.loads(metadata.get("model", "{}"))),
                **{name: arrays[name] for name in known if name in arrays},
            )
        except TraceError as error:
            raise TraceError(f"{path}: {error}") from None
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise TraceError(f"trace {path} has damaged metadata ({error}): record it again") from None
