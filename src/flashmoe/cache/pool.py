"""The slot pool: anonymous memory that the engine takes for its expert tensors.

For every size group of layers and every expert tensor (weights, and tables: biases, scales) there is one *region*:
slots of a fixed stride. The engine sees `address + slot * stride` for a layer's tensor. Direct reads want aligned
offsets, and a slice begins anywhere: so each weight is shifted inside its slot by its own misalignment, and what
alignment adds falls into the slot's slack.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashmoe.cache.prefault import Prefault
from flashmoe.common import numa
from flashmoe.storage.addresses import reserve_huge
from flashmoe.storage.catalog import ExpertCatalog, ExpertTensor
from flashmoe.storage.reader import ExpertReader, Read

_TENSOR_ALIGNMENT = 32
_CACHE_LINE = 64


@dataclass(frozen=True)
class Window:
    """A weight or table of one layer in the pool: slot s of the layer's group is at `address + s * stride`."""

    weight: ExpertTensor
    address: int
    stride: int


@dataclass(frozen=True)
class Layout:
    """Where a weight's slices lie in a slot: `shift` bytes after its start; the slot is `stride` bytes long."""

    shift: int
    stride: int


def slot_layout(weight: ExpertTensor, align: int) -> Layout:
    """The layout of one weight under direct reads in units of `align` bytes.

    Where all slices are equally misaligned, reads land in place. Otherwise the slot has slack on both sides; the
    reads land in place if the drive takes such addresses, and go through a bounce buffer if not. What the engine has
    to place is not read into the slot at all.
    """
    if weight.place:
        return Layout(0, -(-weight.nbytes // _CACHE_LINE) * _CACHE_LINE)
    unit = max(align, _TENSOR_ALIGNMENT)
    equal = weight.misalignment(unit)
    shift, slack = (unit + weight.phase, unit) if equal is None else (equal, 0)
    return Layout(shift, -(-(shift + weight.nbytes + slack) // unit) * unit)


@dataclass(frozen=True)
class Region:
    """Slots of a fixed stride that all layers of a size group share, for one weight or table of each."""

    stride: int
    members: tuple[tuple[int, ExpertTensor, int], ...]  # layer, its weight, and where in a slot that begins


def _regions(catalog: ExpertCatalog, align: int) -> tuple[list[list[Region]], list[list[Region]]]:
    """What a pool is made of: regions of weights, and regions of tables per expert, of each size group."""
    n_groups = max(catalog.groups) + 1
    weights: list[list[Region]] = [[] for _ in range(n_groups)]
    tables: list[list[Region]] = [[] for _ in range(n_groups)]
    for group in range(n_groups):
        members = [(i, catalog.layers[i]) for i, g in enumerate(catalog.groups) if g == group]
        for index in range(len(members[0][1].weights)):
            layouts = [
                (i, layer.weights[index], slot_layout(layer.weights[index], align)) for i, layer in members
            ]
            stride = max(layout.stride for _, _, layout in layouts)
            weights[group].append(Region(stride, tuple((i, p, layout.shift) for i, p, layout in layouts)))
        alike: dict[tuple[int, int], list[tuple[int, ExpertTensor, int]]] = {}
        for i, layer in members:
            for index, table in enumerate(layer.tables):
                alike.setdefault((index, table.nbytes), []).append((i, table, 0))
        tables[group] = [Region(nbytes, tuple(found)) for (_, nbytes), found in alike.items()]
    return weights, tables


def slot_bytes(catalog: ExpertCatalog, align: int) -> list[int]:
    """Bytes of one slot (all its weights and tables) in each size group."""
    weights, tables = _regions(catalog, align)
    return [sum(r.stride for r in (*p, *t)) for p, t in zip(weights, tables, strict=True)]


class SlotPool:
    """Memory for `slots[g]` slots in each size group g. Reserved at once, committed when touched or prefaulted."""

    def __init__(self, catalog: ExpertCatalog, slots: Sequence[int], reader: ExpertReader) -> None:
        align = max(file.align for file in reader.files)
        self._reader = reader
        reader.describe = catalog.describe
        #: Experts of each layer, and how many of them a token is given.
        self.n_experts = [layer.n_experts for layer in catalog.layers]
        self.top_k = [layer.top_k for layer in catalog.layers]
        self._maps: list[mmap.mmap] = []
        #: Address and bytes of all its memory.
        self.regions: list[tuple[int, int]] = []
        self._groups = catalog.groups
        self._strides: list[list[tuple[int, int]]] = []  # of each group: its regions' numbers and strides
        self._highest = [-1] * len(slots)  # slot of each group that was read to
        self.windows: list[list[Window]] = [[] for _ in catalog.layers]
        self._tables: list[list[tuple[Window, NDArray[np.uint8]]]] = [[] for _ in catalog.layers]
        weights, tables = _regions(catalog, align)
        for n, of_weights, of_tables in zip(slots, weights, tables, strict=True):
            self._strides.append([])
            for region in of_weights:
                base = self._reserve(n, region)
                for layer, weight, shift in region.members:
                    self.windows[layer].append(Window(weight, base + shift, region.stride))
            for region in of_tables:
                base = self._reserve(n, region)
                for layer, table, _ in region.members:
                    rows = np.empty((catalog.layers[layer].n_experts, table.nbytes), np.uint8)
                    reader.files[table.file].read_exact(rows.ctypes.data, table.offset, rows.nbytes)
                    self._tables[layer].append((Window(table, base, region.stride), rows))
        self._prefault = Prefault(self.regions)

    def _reserve(self, slots: int, region: Region) -> int:
        """Memory of a region of the latest group; its address."""
        nbytes = slots * region.stride
        memory, address = reserve_huge(nbytes)
        numa.spread(address, nbytes)
        if hasattr(mmap, "MADV_DONTFORK"):
            # a forked process would get page tables of gigabytes, and never use them
            memory.madvise(mmap.MADV_DONTFORK)
        self._maps.append(memory)
        self._reader.keep(memory)
        self._strides[-1].append((len(self.regions), region.stride))
        self.regions.append((address, nbytes))
        return address

    def prefault(self, idle: Callable[[], bool] | None = None) -> None:
        """Commit the memory in the background; idle: whether nothing is evaluated, as it is from here on."""
        if idle:
            self._prefault.idle = idle
        self._prefault.start()

    @property
    def absent(self) -> int:
        """Bytes of the slots in use whose memory is not committed yet."""
        return self._prefault.absent

    @property
    def slot_bytes(self) -> list[int]:
        """Bytes of a slot of each size group."""
        return [sum(stride for _, stride in regions) for regions in self._strides]

    def use(self, group: int, slots: int) -> None:
        """Use the first `slots` slots of a size group only: the memory of the others is given back."""
        self._highest[group] = min(self._highest[group], slots - 1)
        for region, stride in self._strides[group]:
            self._prefault.bound(region, slots * stride)

    def move(self, group: int, source: int, target: int) -> None:
        """Copy what is in one slot of a size group to another one."""
        for region, stride in self._strides[group]:
            base = self.regions[region][0]
            ctypes.memmove(base + target * stride, base + source * stride, stride)

    def reads(self, layer: int, expert: int, slot: int) -> list[Read]:
        """What must be read to fill `slot` (numbered in the layer's group) with an expert, tensor by tensor."""
        group = self._groups[layer]
        if slot > self._highest[group]:
            self._highest[group] = slot
            for region, stride in self._strides[group]:
                self._prefault.reach(region, (slot + 1) * stride)
        return [
            Read(file, offset, nbytes, window.address + slot * window.stride + at, place, whole)
            for window in self.windows[layer]
            for extents in [window.weight.extents(expert)]
            for whole in [len(extents) == 1]
            for file, offset, nbytes, at, place in extents
        ]

    def tables(self, layer: int) -> list[Window]:
        """Windows of the layer's resident tables (per-expert biases and scales)."""
        return [window for window, _ in self._tables[layer]]

    def fill_tables(self, layer: int, expert: int, slot: int) -> None:
        """Copy the expert's rows of the resident tables into its slot."""
        for window, rows in self._tables[layer]:
            ctypes.memmove(window.address + slot * window.stride, rows[expert].ctypes.data, window.stride)

    def close(self) -> None:
        """End prefaulting and give the memory back: what follows needs it."""
        self._prefault.close()
        for memory in self._maps:  # addresses stay reserved until nothing refers to the pool any more
            memory.madvise(mmap.MADV_DONTNEED)
