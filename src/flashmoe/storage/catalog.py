"""The expert catalog: for every (layer, expert, weight) the bytes in the model's files.

The expert tensors of a layer are up, gate and down, or a fused gate_up; an expert's slice of each is contiguous.
A *table* is a per-expert bias or scale: too small to stream, so it stays resident and is copied into the slot.
"""

from __future__ import annotations

import hashlib
import re
import statistics
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from flashmoe.common.text import printable
from flashmoe.errors import ModelError
from flashmoe.storage import foreign
from flashmoe.storage.aio import Place, Read
from flashmoe.storage.checkpoint import Checkpoint
from flashmoe.storage.gguf import GGUF, TensorInfo

_MOST_HASHED = 64 << 20  # bytes of a router; no real one has as many
MAX_EXPERTS = 1 << 14  # of a layer; far beyond all models, and ids stay within 16 bits
# up and gate are multiplied first, down last: the order in which a slot's weights are read
_ORDER = ("ffn_up_exps", "ffn_gate_exps", "ffn_gate_up_exps", "ffn_down_exps")
_VALUES = "attn_v_exps"  # experts for the values of attention, with a router of their own
_EXPERT_TENSOR = re.compile(rf"blk\.(\d+)\.({'|'.join((*_ORDER, _VALUES))})\.(weight|bias|scale)")
_BLOCK = re.compile(r"blk\.(\d+)\.")
# The same pattern for the engine's tensor overrides
EXPERTS_PATTERN = rf"^blk\.[0-9]+\.({'|'.join((*_ORDER, _VALUES))})\.(weight|bias|scale)$"
_TOKEN_TABLE, _LAYERS_TABLE = "token_embd.weight", "per_layer_token_embd.weight"
_WORTH_STREAMING = 32 << 20  # bytes of a table of rows


class Extent(NamedTuple):
    """`nbytes` at `offset` of file number `file`, which belong `at` bytes after the start of an expert's slice."""

    file: int
    offset: int
    nbytes: int
    at: int = 0
    place: Place | None = None


@dataclass(frozen=True)
class ExpertTensor:
    """One expert tensor: expert e's slice is `nbytes` bytes at `offset + e * stride` of file number `file`.

    Where the engine keeps slices in a layout of its own, as long as the file's, `place` puts one into a slot.
    """

    tensor: TensorInfo
    file: int
    nbytes: int
    offset: int
    stride: int
    place: Place | None = None

    def extents(self, expert: int) -> Sequence[Extent]:
        """Where an expert's slice is."""
        return (Extent(self.file, self.offset + expert * self.stride, self.nbytes, 0, self.place),)

    def misalignment(self, unit: int) -> int | None:
        """Bytes by which all slices miss a multiple of `unit` in their file; None where they differ."""
        return self.offset % unit if self.stride % unit == 0 else None

    @property
    def phase(self) -> int:
        """By how many bytes slices are to miss a cache line's beginning in memory, where their place is free."""
        return 0

    @property
    def placed_bytes(self) -> int:
        """Bytes of the largest read that has to be placed; 0 without any."""
        return self.nbytes if self.place else 0


class RowTable(NamedTuple):
    """A table, [row length, rows], of which the engine only gathers rows, so many for each token."""

    tensor: TensorInfo
    per_token: int


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one MoE layer, of which a token is given `top_k`.

    `block` is its number in the model (dense blocks count too). values: they are for the values of its attention.
    """

    block: int
    n_experts: int
    top_k: int
    weights: tuple[ExpertTensor, ...]
    tables: tuple[ExpertTensor, ...]
    values: bool = False

    @property
    def expert_bytes(self) -> int:
        """Bytes read from the file when one expert misses."""
        return sum(weight.nbytes for weight in self.weights)


@dataclass(frozen=True)
class ExpertCatalog:
    """All MoE layers of a model that run, in order. Layer numbers in FlashMoE are indices into `layers`.

    Blocks of token prediction do not run, and nothing of them is loaded.
    """

    source: GGUF | Checkpoint
    layers: tuple[ExpertLayer, ...]

    @property
    def gguf(self) -> GGUF:
        """The source of a model that llama.cpp runs."""
        assert isinstance(self.source, GGUF)
        return self.source

    @property
    def label(self) -> str:
        """Name of the model's (first) file, or of its folder."""
        return printable(self.source.files[0].name) if isinstance(self.source, GGUF) else self.source.name

    @cached_property
    def n_experts(self) -> int:
        """Experts of the largest layer."""
        return max(layer.n_experts for layer in self.layers)

    @cached_property
    def top_k(self) -> int:
        """Experts that a token is given by the layer that gives it most."""
        return max(layer.top_k for layer in self.layers)

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of all streamed expert slices."""
        return sum(layer.expert_bytes * layer.n_experts for layer in self.layers)

    @cached_property
    def table_bytes(self) -> int:
        """Bytes of all tables per expert (biases, scales), which are copied from as experts come."""
        return sum(layer.n_experts * table.nbytes for layer in self.layers for table in layer.tables)

    @cached_property
    def resident(self) -> dict[str, TensorInfo]:
        """What stays in RAM: all tensors of blocks that run but experts' weights and tables that are read by rows."""
        streamed = {p.tensor.name for layer in self.layers for p in layer.weights}
        streamed.update(table.tensor.name for table in self.row_tables)
        tensors = self.source.tensors
        return {n: t for n, t in tensors.items() if n not in streamed and n not in self.skipped}

    @cached_property
    def dense_bytes(self) -> int:
        """Bytes of what stays in RAM."""
        return sum(t.nbytes for t in self.resident.values())

    @cached_property
    def skipped(self) -> frozenset[str]:
        """Tensors of blocks that do not run."""
        if not isinstance(self.source, GGUF):
            return frozenset()
        last = _blocks(self.source)
        named = ((n, _BLOCK.match(n)) for n in self.source.tensors)
        return frozenset(n for n, match in named if match and int(match[1]) >= last)

    @cached_property
    def gathered(self) -> tuple[RowTable, ...]:
        """Tables that are only gathered from: embeddings of tokens where the output has weights of its own, and those
        of every layer's, of tokens or of hashes of the last ones."""
        tensors = self.source.tensors
        names = [_TOKEN_TABLE] if "output.weight" in tensors else []
        found = [tensors[name] for name in (*names, _LAYERS_TABLE) if name in tensors]
        heads = self.source.arch_value("ple.head_offsets") if isinstance(self.source, GGUF) else None
        hashes = len(heads) if isinstance(heads, list) else 1
        return tuple(
            RowTable(t, hashes if t.name == _LAYERS_TABLE else 1) for t in found if len(t.shape) == 2
        )

    @cached_property
    def row_tables(self) -> tuple[RowTable, ...]:
        """Those that are so large that their rows are read as they are gathered."""
        return tuple(table for table in self.gathered if table.tensor.nbytes >= _WORTH_STREAMING)

    @cached_property
    def override_pattern(self) -> str:
        """Which tensors the engine's loader is to leave to us (ECMAScript regex, searched anywhere in the name)."""
        tables = [f"^{re.escape(table.tensor.name)}$" for table in self.row_tables]
        blocks = sorted({name.split(".")[1] for name in self.skipped})
        return "|".join([EXPERTS_PATTERN, *tables, *(rf"^blk\.{block}\." for block in blocks)])

    @cached_property
    def largest_placed(self) -> int:
        """Bytes of the largest read that has to be placed; 0 without any."""
        return max((p.placed_bytes for layer in self.layers for p in layer.weights), default=0)

    @cached_property
    def read_bytes(self) -> int:
        """Bytes of a read from the drive: an expert's slice of a weight, as they usually are."""
        return int(statistics.median(weight.nbytes for layer in self.layers for weight in layer.weights))

    @cached_property
    def total_experts(self) -> int:
        return sum(layer.n_experts for layer in self.layers)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """A number of each layer that graphs know it by: its block, or behind all blocks where it is for values."""
        return tuple(layer.block + (self.first_value_place if layer.values else 0) for layer in self.layers)

    @cached_property
    def first_value_place(self) -> int:
        """Where the places of layers for values begin; 0 where there are none."""
        return max(x.block for x in self.layers) + 1 if any(x.values for x in self.layers) else 0

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """Group of each layer: layers whose weights have the same sizes share slots."""
        numbers: dict[tuple[int, ...], int] = {}
        return tuple(
            numbers.setdefault(tuple(p.nbytes for p in layer.weights), len(numbers)) for layer in self.layers
        )

    @cached_property
    def identity(self) -> dict[str, str]:
        """What tells this model from another, for traces and trained files: see `same_model`. Reads the router of
        the first MoE layer (512 KiB in OLMoE). Raises ModelError where that fails."""
        names = hashlib.sha256(
            "\n".join(f"{t.name} {t.type} {t.shape}" for t in self.source.tensors.values()).encode()
        ).hexdigest()
        known = {
            "architecture": self.source.architecture,
            "name": self.source.name,
            "layers": str(len(self.layers)),
            "experts": str(self.n_experts),
            "top_k": str(self.top_k),
            "groups": ",".join(map(str, self.groups)),
            "tensors_sha256": names,
        }
        router = self.source.tensors.get(f"blk.{self.layers[0].block}.ffn_gate_inp.weight")
        if router is not None:
            known["router_sha256"] = _content_hash(router)
        return known

    def describe(self, read: Read) -> str:
        """Layer, expert and tensor that a read is of; "" where it is of none. Slow: for errors."""
        for number, layer in enumerate(self.layers):
            for weight in layer.weights:
                for expert in range(layer.n_experts):
                    for extent in weight.extents(expert):
                        within = extent.offset <= read.offset < extent.offset + extent.nbytes
                        if extent.file == read.file and within:
                            return f"expert {expert} of layer {number}, {weight.tensor.name}"
        return ""

    def only(self, tensors: Container[str]) -> ExpertCatalog:
        """The layers whose weights are in `tensors`: builds of an engine may skip more blocks than we know of."""
        kept = tuple(layer for layer in self.layers if all(p.tensor.name in tensors for p in layer.weights))
        return replace(self, layers=kept)

    def placed(self, places: Mapping[str, Place]) -> ExpertCatalog:
        """The same catalog, where the weights named in `places` get into slots that way."""

        def with_places(layer: ExpertLayer) -> ExpertLayer:
            weights = (replace(p, place=places.get(p.tensor.name)) for p in layer.weights)
            return replace(layer, weights=tuple(weights))

        return replace(self, layers=tuple(map(with_places, self.layers)))

    @classmethod
    def from_gguf(cls, gguf: GGUF) -> ExpertCatalog:
        """Find the experts of `gguf`. Raises ModelError for a dense model or experts of an unknown kind."""
        name = gguf.files[0]
        if what := foreign.of_contents(gguf.metadata, gguf.tensors):
            raise ModelError(f"{name}: {what}")
        found: dict[tuple[int, bool], list[tuple[int, TensorInfo]]] = defaultdict(list)
        for tensor in gguf.tensors.values():
            if match := _EXPERT_TENSOR.fullmatch(tensor.name):
                values = match[2] == _VALUES
                found[int(match[1]), not values].append((0 if values else _ORDER.index(match[2]), tensor))
        if not found:
            raise ModelError(
                f"{name}: a dense model ({gguf.architecture or 'unknown architecture'}), it has no experts to stream; "
                "run it with stock llama.cpp"
            )
        last = _blocks(gguf)
        files = {path: i for i, path in enumerate(gguf.files)}
        layers = tuple(
            _layer(gguf, block, found[block, ffn], files, values=not ffn)
            for block, ffn in sorted(found)  # attention comes before the feed-forward network
            if block < last
        )
        if not layers:
            raise ModelError(
                f"{name}: only the blocks that predict further tokens, which run beside a model of their own; "
                "give the file of the model itself"
            )
        return cls(gguf, layers)


def same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two identities can be of one model; what either lacks (it came from another program, or an earlier
    version) is not compared.

    Where both have a router's hash, that decides: training changes a router, and quantisation leaves it as it is
    (llama.cpp keeps routers in F32). Else all tensors' names, types and shapes do.
    """

    def both(key: str) -> bool:
        return bool(one.get(key) and other.get(key))

    telling = "router_sha256" if both("router_sha256") else "tensors_sha256"
    return all(one[key] == other[key] for key in ("architecture", telling) if both(key))


def _content_hash(tensor: TensorInfo) -> str:
    try:
        with open(tensor.file, "rb") as file:
            file.seek(tensor.offset)
            return hashlib.sha256(file.read(min(tensor.nbytes, _MOST_HASHED))).hexdigest()
    except OSError as error:
        raise ModelError(f"{tensor.file}: cannot be read ({error.strerror})") from None


def _blocks(gguf: GGUF) -> int:
    """Blocks that run: those that predict further tokens come last, and do not.

    A file can say that it has such blocks, and not have them; then all of its blocks run (as in llama.cpp).
    """
    count, prediction = gguf.arch_int("block_count", 1 << 16), gguf.arch_value("nextn_predict_layers", 0)
    if not isinstance(prediction, int) or not 0 <= prediction <= count:
        raise ModelError(
            f"{gguf.files[0]}: damaged GGUF: nextn_predict_layers is {prediction!r} of {count} blocks"
        )
    first = count - prediction
    predicts = any(name.startswith(f"blk.{first}.nextn.") for name in gguf.tensors)
    return first if predicts else count


def _of_block(gguf: GGUF, key: str, block: int) -> int:
    """A number that some architectures give per block."""
    value = gguf.arch_value(key)
    if isinstance(value, list):
        value = value[block] if block < len(value) else None
    if not isinstance(value, int):
        raise ModelError(f"{gguf.files[0]}: damaged GGUF: {key} is {gguf.arch_value(key)!r}")
    return value


def _layer(
    gguf: GGUF,
    block: int,
    tensors: Iterable[tuple[int, TensorInfo]],
    files: dict[Path, int],
    *,
    values: bool,
) -> ExpertLayer:
    prefix = "attention.value_expert" if values else "expert"
    top_k, count = (_of_block(gguf, f"{prefix}_{what}", block) for what in ("used_count", "count"))
    ordered = [tensor for _, tensor in sorted(tensors, key=lambda item: (item[0], item[1].name))]
    large = [t for t in ordered if t.name.endswith(".weight")]
    if not large or len({t.shape[-1] for t in ordered}) != 1 or any(len(t.shape) != 3 for t in large):
        raise ModelError(f"{ordered[0].file}: the expert tensors of block {block} do not fit together")
    n = large[0].shape[-1]
    if not 0 < top_k <= n <= min(count, MAX_EXPERTS):
        raise ModelError(
            f"{gguf.files[0]}: damaged GGUF: {n} experts in block {block}, {prefix}_count is {count}, "
            f"{prefix}_used_count {top_k}"
        )
    experts = {
        t.name: ExpertTensor(t, files[t.file], t.nbytes // n, t.offset, t.nbytes // n) for t in ordered
    }
    return ExpertLayer(
        block,
        n,
        top_k,
        tuple(experts[t.name] for t in large),
        tuple(table for name, table in experts.items() if not name.endswith(".weight")),
        values,
    )
