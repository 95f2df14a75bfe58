"""Traces from other formats, and several traces from one or one from several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.errors import TraceError
from flashmoe.routing.trace import RoutingTrace
from flashmoe.storage.arrays import read_npz as arrays_of_npz

MOST = float(np.finfo(np.float16).max)


def read(path: str | Path) -> RoutingTrace:
    """A trace from a file of any known kind, by its suffix: .safetensors, .npz, .jsonl. Raises TraceError."""
    suffix = Path(path).suffix.lower()
    if suffix == ".npz":
        return read_npz(path)
    if suffix == ".jsonl":
        return read_jsonl(path)
    return RoutingTrace.load(path)


def read_npz(path: str | Path) -> RoutingTrace:
    """Import `expert_ids` [T, L, k] with optional sequence_id, token_id, num_experts, first_moe_layer."""
    if not Path(path).is_file():
        raise TraceError(f"trace {path} does not exist")
    try:
        arrays = arrays_of_npz(path)
    except (OSError, ValueError) as error:
        raise TraceError(f"{path} is damaged or no .npz file ({error}): fetch it again") from None
    if "expert_ids" not in arrays:
        raise TraceError(
            f"{path} has no array expert_ids [tokens, layers, k]; it has {', '.join(arrays) or 'none'}"
        )
    ids = arrays["expert_ids"]
    if ids.size == 0:
        raise TraceError(f"{path} is empty: it has no tokens")
    optional = {
        name: arrays[name] for name in ("sequence_id", "token_id", "router_weights") if name in arrays
    }
    try:
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"expert ids must be integers, got {ids.dtype}")
        num_experts = int(arrays.get("num_experts", int(ids.max()) + 1))
        first_moe_layer = int(arrays.get("first_moe_layer", 0))
    except (ValueError, TypeError, OverflowError) as error:
        raise TraceError(f"{path}: {error}") from None
    return RoutingTrace(
        expert_ids=ids,
        num_experts=num_experts,
        first_moe_layer=first_moe_layer,
        model={"name": Path(path).stem},
        **optional,
    )


def read_jsonl(path: str | Path) -> RoutingTrace:
    """Import one JSON object per token: {"experts": [[k ids] per layer], "sequence": 0, "token": 17,
    "weights": [...]}.

    A first line without "experts" may give "num_experts", "first_moe_layer" and "model". Raises TraceError
    with the number of the line that is wrong.
    """
    head: dict[str, Any] = {}
    ids: list[NDArray[np.int16]] = []
    weights: list[NDArray[np.float16]] = []
    tokens, sequences = [], []
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for line in file:
                number += 1
                if not line.strip():
                    continue
                row = json.loads(line)
                if "experts" not in row and not ids:
                    head.update(row)
                    continue
                experts = np.asarray(row["experts"], np.int16)
                if experts.ndim != 2 or (ids and experts.shape != ids[0].shape):
                    raise ValueError("experts must be [layers][k], the same in every line")
                ids.append(experts)
                tokens.append(int(row.get("token", -1)))
                sequences.append(int(row.get("sequence", 0)))
                if "weights" in row:
                    weights.append(np.clip(np.asarray(row["weights"], float), -MOST, MOST).astype(np.float16))
        if not ids:
            raise TraceError(f"{path} is empty: it has no line with experts")
        stacked = np.stack(ids)
        return RoutingTrace(
            expert_ids=stacked,
            num_experts=int(head.get("num_experts", int(stacked.max()) + 1)),
            token_id=np.array(tokens, np.int64),
            sequence_id=np.array(sequences, np.int64),
            router_weights=np.stack(weights) if len(weights) == len(ids) else None,
            first_moe_layer=int(head.get("first_moe_layer", 0)),
            model=dict(head.get("model") or {"name": Path(path).stem}),
        )
    except OSError as error:
        raise TraceError(f"trace {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError, RecursionError) as error:
        raise TraceError(f"{path}, line {number}: {error}") from None


def merge(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """Several traces of one model, one after another; sequences are numbered anew. Raises TraceError
    otherwise."""
    if not traces:
        raise TraceError("nothing to merge: give at least one trace")
    first = traces[0]
    for other in traces[1:]:
        if (other.n_layers, other.top_k, other.num_experts) != (
            first.n_layers,
            first.top_k,
            first.num_experts,
        ):
            raise TraceError("the traces are of models of different shape: merge only traces of one model")
        if dict(other.model) != dict(first.model):
            raise TraceError(
                f"the traces are of {dict(first.model)} and {dict(other.model)}: merge only one model's"
            )
    sequence, step, n_sequences, n_steps = [], [], 0, 0
    for trace in traces:
        begins = trace.begins()
        sequence.append(n_sequences + np.cumsum(begins) - 1)
        step.append(trace.step - trace.step[0] + n_steps)
        n_sequences, n_steps = int(sequence[-1][-1]) + 1, int(step[-1][-1]) + 1

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(trace, name) for trace in traces])

    def in_all(name: str) -> NDArray[Any] | None:
        return joined(name) if all(getattr(trace, name) is not None for trace in traces) else None

    return replace(
        first,
        expert_ids=joined("expert_ids"),
        token_id=joined("token_id"),
        sequence_id=np.concatenate(sequence).astype(np.int32),
        phase=joined("phase"),
        step=np.concatenate(step).astype(np.int32),
        router_weights=in_all("router_weights"),
        ranked_ids=in_all("ranked_ids"),
        ranked_scores=in_all("ranked_scores"),
        score_range=in_all("score_range"),
    )


def split(trace: RoutingTrace, share: float, seed: int | None = None) -> tuple[RoutingTrace, RoutingTrace]:
    """Whole sequences into two traces, the first with about `share` (0..1) of the tokens.

    seed None keeps the order (the second part is what came last); else sequences are drawn. A trace of one
    sequence is cut in the middle of it. Raises TraceError where one part would be empty.
    """
    if not 0 < share < 1:
        raise TraceError(f"the share must lie between 0 and 1, got {share}")
    begins = trace.begins()
    run = np.cumsum(begins) - 1
    sizes = np.bincount(run)
    if len(sizes) == 1:
        cut = round(share * trace.n_tokens)
        mask = np.arange(trace.n_tokens) < cut
    else:
        order = np.arange(len(sizes)) if seed is None else np.random.default_rng(seed).permutation(len(sizes))
        before = np.cumsum(sizes[order]) - sizes[order]
        chosen = np.zeros(len(sizes), bool)
        chosen[order[before < share * trace.n_tokens]] = True
        if chosen.all():
            chosen[order[-1]] = False
        mask = chosen[run]
    if mask.all() or not mask.any():
        raise TraceError("the trace is too short to split: record more tokens")
    return trace.rows(mask), trace.rows(~mask)
