"""The pool's slots as tensors, and a second set of them on a device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.pool import SlotPool, Window
from flashmoe.engines.transformers.catalog import TORCH_DTYPES
from flashmoe.engines.transformers.device import Device
from flashmoe.storage.catalog import ExpertCatalog

_CACHE_LINE = 64

#: The weights of one expert by their names in the module, [1, rows, columns] each.
Weights = dict[str, torch.Tensor]
#: Called with an expert and its weights when they are in.
Each = Callable[[int, Weights], None]


class Residents(Protocol):
    """Where a model's experts are."""

    @property
    def computes(self) -> bool:
        """Whether experts may come in RAM to a model that computes elsewhere."""

    @property
    def waited(self) -> float:
        """Seconds spent on copies between tiers, and on waiting for them."""

    def begin_step(self, tokens: int, top_k: int) -> None:
        """Call before `tokens` tokens are evaluated at once."""

    def ensure(
        self,
        layer: int,
        ids: NDArray[np.int32],
        meanwhile: Callable[[], None],
        each: Each,
        *,
        anywhere: bool,
    ) -> None:
        """Let `each` have every expert of `ids`, int32 [tokens, k], as it is complete; `meanwhile` is called once.

        anywhere: weights in RAM will do, where `computes`. Raises BudgetError where they do not fit at once, and
        ReadError.
        """


class HostSlots:
    """The slots of a pool in RAM; valid as long as the pool."""

    def __init__(self, pool: SlotPool, slots: Sequence[int], catalog: ExpertCatalog) -> None:
        """slots[g]: of size group g."""
        self._views = [
            {_name(window): _host_view(window, slots[group]) for window in windows}
            for windows, group in zip(pool.windows, catalog.groups, strict=True)
        ]

    def of(self, layer: int, slot: int) -> Weights:
        """What slot `slot` of the layer's size group is to this layer."""
        return {name: view[slot : slot + 1] for name, view in self._views[layer].items()}


class InRam:
    """Implements `Residents` with a cache in RAM alone."""

    computes, waited = False, 0.0

    def __init__(self, cache: ExpertCache, slots: HostSlots) -> None:
        self._cache, self._slots = cache, slots

    def begin_step(self, tokens: int, top_k: int) -> None:
        self._cache.begin_step(tokens, top_k)

    def ensure(
        self,
        layer: int,
        ids: NDArray[np.int32],
        meanwhile: Callable[[], None],
        each: Each,
        *,
        anywhere: bool,
    ) -> None:
        def run(expert: int, slot: int) -> None:
            each(expert, self._slots.of(layer, slot))

        self._cache.ensure(layer, ids, meanwhile=meanwhile, each=run)


class Copy(NamedTuple):
    """An expert that is to come from the tier below into a slot, numbered in the layer's size group."""

    layer: int
    expert: int
    slot: int


class DeviceSlots:
    """Slots on a device. To an ExpertCache it is the pool: what it would read are copies."""

    def __init__(self, device: Device, below: SlotPool, slots: Sequence[int], catalog: ExpertCatalog) -> None:
        """below: the pool that copies come from, with the same catalog. slots[g]: of size group g."""
        self.windows, self.n_experts, self.top_k = below.windows, below.n_experts, below.top_k
        regions: dict[tuple[int, int], torch.Tensor] = {}
        self._views: list[Weights] = []
        for windows, group in zip(below.windows, catalog.groups, strict=True):
            views = {}
            for index, window in enumerate(windows):
                # layers that share slots may begin at different places of a cache line
                stride = (-(-window.weight.nbytes // _CACHE_LINE) + 1) * _CACHE_LINE
                if (group, index) not in regions:
                    regions[group, index] = torch.empty(
                        slots[group] * stride + _CACHE_LINE, dtype=torch.uint8, device=device.place
                    )
                region = regions[group, index]
                shift = (device.phase(window.address) - region.data_ptr()) % _CACHE_LINE
                views[_name(window)] = _view(region[shift:], window, slots[group], stride)
            self._views.append(views)

    def of(self, layer: int, slot: int) -> Weights:
        """What slot `slot` of the layer's size group is to this layer."""
        return {name: view[slot : slot + 1] for name, view in self._views[layer].items()}

    def reads(self, layer: int, expert: int, slot: int) -> list[Copy]:
        return [Copy(layer, expert, slot)]

    def fill_tables(self, layer: int, expert: int, slot: int) -> None:
        """Checkpoints have no tables: what is small per expert stays in the module."""


def _name(window: Window) -> str:
    return window.weight.tensor.name.rpartition(".")[2]


def _host_view(window: Window, slots: int) -> torch.Tensor:
    nbytes = (slots - 1) * window.stride + window.weight.nbytes
    memory = (ctypes.c_char * nbytes).from_address(window.address)
    return _view(torch.frombuffer(memory, dtype=torch.uint8), window, slots, window.stride)


def _view(raw: torch.Tensor, window: Window, slots: int, stride: int) -> torch.Tensor:
    """Bytes as a tensor [slots, rows, columns]."""
    info = window.weight.tensor
    dtype = TORCH_DTYPES[info.type]
    rows, columns = info.shape[1], info.shape[2]
    count = ((slots - 1) * stride + window.weight.nbytes) // dtype.itemsize
    flat = raw[: count * dtype.itemsize].view(dtype)
    return flat.as_strided(
        (slots, rows, columns), (stride // dtype.itemsize, columns, 1), flat.storage_offset()
    )
