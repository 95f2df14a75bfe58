"""From a checkpoint's tensors to an expert catalog, by the library's own conversion mapping.

Checkpoints keep experts as one tensor per expert and projection, or all experts in one, under names of their own;
models have one weight per projection for all experts. How the one becomes the other is in the library's
`conversion_mapping`: this module asks it which tensors make a weight and, from the operations named there, works out
which bytes make one expert's slice of it.
"""

from __future__ import annotations

import ctypes
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from flashmoe.engines.transformers.skeleton import Skeleton
from flashmoe.errors import ModelError
from flashmoe.storage.aio import Place
from flashmoe.storage.catalog import MAX_EXPERTS, ExpertCatalog, ExpertLayer, ExpertTensor, Extent
from flashmoe.storage.checkpoint import DTYPES, Checkpoint
from flashmoe.storage.gguf import TensorInfo

_PIECE = 4 << 20  # bytes; what is joined in memory is read in pieces, which need less memory aside
_VECTOR = 16  # bytes; kernels for F32 round differently for data that is not aligned so
_CACHE_LINE = 64
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class ScatteredTensor(ExpertTensor):
    """A weight whose slices are anywhere in the files: `where[e]` are the extents of expert e's."""

    where: tuple[tuple[Extent, ...], ...] = ()
    #: Whether the library itself would have each slice in memory as it lies in the file, and not a copy.
    mapped: bool = False

    def extents(self, expert: int) -> Sequence[Extent]:
        return self.where[expert]

    def misalignment(self, unit: int) -> int | None:
        found = {extents[0].offset % unit for extents in self.where}
        # a copy of the library's would be aligned; what it maps is where the file has it
        copied = self.tensor.type == "F32" and not self.mapped
        aligned = _VECTOR if copied else TORCH_DTYPES[self.tensor.type].itemsize
        return found.pop() if len(found) == 1 and min(found) % aligned == 0 else None

    @property
    def phase(self) -> int:
        return (self.misalignment(_CACHE_LINE) or 0) if self.mapped else 0

    @property
    def placed_bytes(self) -> int:
        return max((e.nbytes for extents in self.where for e in extents if e.place), default=0)


@dataclass(frozen=True)
class Layout:
    """The tensors of a checkpoint by their use in the model."""

    catalog: ExpertCatalog
    dense: tuple[str, ...]  # names of the tensors that the model loads as usual
    dtype: torch.dtype  # of the experts


def read_layout(checkpoint: Checkpoint, skeleton: Skeleton) -> Layout:
    """Where the experts of a checkpoint are, and what else the model needs of it.

    Raises ModelError where experts are missing, or kept in a way that is not known.
    """
    wanted = {
        f"{name}.{weight}": parameter
        for name in skeleton.experts
        for weight, parameter in skeleton.streamed(name).items()
    }
    found, converters, dense = _assign(checkpoint, skeleton.model, set(wanted))
    files = {path: i for i, path in enumerate(checkpoint.files)}
    weights = {
        name: _weight(checkpoint, name, parameter, found.get(name, {}), converters.get(name), files)
        for name, parameter in wanted.items()
    }
    types = {weight.tensor.type for weight in weights.values()}
    if len(types) != 1 or not types <= TORCH_DTYPES.keys():
        raise ModelError(
            f"{checkpoint.folder}: experts of the types {', '.join(sorted(types))}; the transformers engine runs "
            "BF16, F16 or F32"
        )
    layers = []
    for number, name in enumerate(skeleton.experts):
        count = skeleton.model.get_submodule(name).num_experts
        block = next((int(part) for part in name.split(".") if part.isdecimal() and len(part) < 10), number)
        if not skeleton.top_k <= count <= MAX_EXPERTS:
            raise ModelError(f"{checkpoint.folder}: {count} experts, {skeleton.top_k} of them per token")
        own = tuple(weights[f"{name}.{weight}"] for weight in skeleton.streamed(name))
        layers.append(ExpertLayer(block, count, skeleton.top_k, own, ()))
    used = {tensor for sources in found.values() for names in sources.values() for tensor in names}
    catalog = ExpertCatalog(checkpoint.only(used | set(dense)), tuple(layers))
    return Layout(catalog, tuple(dense), TORCH_DTYPES[types.pop()])


#: The tensors of a weight, by the pattern of the conversion that they matched ("" where they are only renamed).
_Sources = dict[str, list[str]]


def _assign(
    checkpoint: Checkpoint, model: Any, experts: set[str]
) -> tuple[dict[str, _Sources], dict[str, Any], list[str]]:
    """For each of the weights `experts` its tensors and its converter; and the names of all other tensors in use.

    Follows `core_model_loading.convert_and_load_state_dict_in_model`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    known = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in known for pattern in entry.source_patterns}
    weights = model.state_dict()
    prefix = model.base_model_prefix
    found: dict[str, _Sources] = defaultdict(lambda: defaultdict(list))
    converters: dict[str, Any] = {}
    dense = []
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, known, prefix, weights)
        if target not in weights and name in weights:
            target, pattern = rename_source_key(name, [], [], prefix, weights)
        if target in experts:
            found[target][pattern or ""].append(name)
            converters[target] = by_pattern[pattern] if pattern else None
        elif target in weights:
            dense.append(name)
    return found, converters, dense


def _weight(
    checkpoint: Checkpoint, name: str, parameter: Any, found: _Sources, converter: Any, files: dict[Any, int]
) -> ScatteredTensor:
    """One weight of all experts, [experts, rows, columns]. Raises ModelError."""
    count, *shape = parameter.shape
    operations = converter.operations if converter else []
    kinds = [(type(op).__name__, getattr(op, "dim", None)) for op in operations]
    patterns = converter.source_patterns if converter else [""]
    parts = [[checkpoint.tensors[n] for n in found.get(pattern, ())] for pattern in patterns]
    missing = [p for p, tensors in zip(patterns, parts, strict=True) if not tensors]
    if missing:
        raise ModelError(f"{checkpoint.folder}: the tensors of {missing[0] or name} are missing")
    merged = kinds[:1] == [("MergeModulelist", 0)]
    reorder, mapped = None, not operations
    rest = kinds[1:] if merged else kinds
    if rest and rest[0][0] in ("Transpose", "Interleave") and not merged and len(parts) == 1:
        reorder, rest = operations[0], rest[1:]
        if getattr(reorder, "check_dims", False):
            turned = parts[0][0].shape != parameter.shape
            reorder = type(reorder)(reorder.dim0, reorder.dim1) if turned else None
            mapped = not turned
    if rest not in ([], [("Concatenate", 1)]) or len(converter.target_patterns if converter else [0]) != 1:
        raise ModelError(
            f"{checkpoint.folder}: {name} is made from the checkpoint in a way that FlashMoE does not know "
            f"({', '.join(kind for kind, _ in kinds)}); please report it"
        )
    kind = parts[0][0].type
    if any(t.type != kind for tensors in parts for t in tensors):
        raise ModelError(f"{checkpoint.folder}: the experts of {name} are of different types")
    size = math.prod(shape) * DTYPES[kind]
    where = []
    for expert in range(count):
        extents: list[Extent] = []
        for tensors in parts:
            if len(tensors) != (count if merged else 1):
                raise ModelError(f"{checkpoint.folder}: {len(tensors)} tensors of {count} experts for {name}")
            tensor = tensors[expert if merged else 0]
            nbytes = tensor.nbytes if merged else tensor.nbytes // count
            offset = tensor.offset + (0 if merged else expert * nbytes)
            extents.append(Extent(files[tensor.file], offset, nbytes, sum(e.nbytes for e in extents)))
        where.append(_joined(extents))
        if sum(e.nbytes for e in extents) != size:
            raise ModelError(
                f"{checkpoint.folder}: the tensors of {name} do not have the shape that it needs"
            )
    place: Place | None = None
    if reorder is not None:
        place = partial(_reorder, reorder, parts[0][0].shape[1:], TORCH_DTYPES[kind])
        where = [[extent._replace(place=place) for extent in extents] for extents in where]
    elif any(len(extents) > 1 for extents in where):
        place = _copy(size)
        where = [[piece for extent in extents for piece in _pieces(extent)] for extents in where]
    first = where[0][0]
    return ScatteredTensor(
        TensorInfo(
            name, tuple(parameter.shape), kind, checkpoint.files[first.file], first.offset, count * size
        ),
        first.file,
        size,
        first.offset,
        0,
        place,
        tuple(tuple(extents) for extents in where),
        mapped=mapped,
    )


def _joined(extents: list[Extent]) -> list[Extent]:
    """The same, where possible as one."""
    joined = extents[:1]
    for extent in extents[1:]:
        last = joined[-1]
        if extent.file == last.file and extent.offset == last.offset + last.nbytes:
            joined[-1] = last._replace(nbytes=last.nbytes + extent.nbytes)
        else:
            joined.append(extent)
    return joined


def _pieces(extent: Extent) -> list[Extent]:
    """An extent in pieces that are put into the slot one by one."""
    starts = range(0, extent.nbytes, _PIECE)
    sizes = [min(_PIECE, extent.nbytes - start) for start in starts]
    return [
        Extent(extent.file, extent.offset + start, size, extent.at + start, _copy(size))
        for start, size in zip(starts, sizes, strict=True)
    ]


def _copy(nbytes: int) -> Place:
    return partial(_move, nbytes)


def _move(nbytes: int, source: int, target: int) -> None:
    ctypes.memmove(target, source, nbytes)


def _reorder(operation: Any, shape: Sequence[int], dtype: torch.dtype, source: int, target: int) -> None:
    """Put one expert's slice of `shape` into a slot as the library's operation would."""
    size = math.prod(shape)
    raw = (ctypes.c_char * (size * dtype.itemsize)).from_address(source)
    tensor = torch.frombuffer(raw, dtype=dtype).view(1, *shape)
    (made,) = operation.convert({"x": [tensor]}, ["x"], ["x"]).values()
    ctypes.memmove(target, made.data_ptr(), size * dtype.itemsize)
