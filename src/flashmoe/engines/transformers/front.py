"""The tier of experts on a device: how many slots it gets, and how it is joined to the pool in RAM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashmoe.cache import sizing
from flashmoe.cache.expert_cache import ExpertCache
from flashmoe.cache.policies.base import EvictionPolicy
from flashmoe.cache.pool import SlotPool
from flashmoe.common.units import format_bytes, parse_bytes
from flashmoe.engines.transformers.device import Device
from flashmoe.engines.transformers.experts import PooledExperts
from flashmoe.engines.transformers.latency import TOKENS, Latency, measure
from flashmoe.engines.transformers.slots import DeviceSlots, HostSlots, Weights
from flashmoe.engines.transformers.tiers import Tiers
from flashmoe.errors import BudgetError
from flashmoe.storage.catalog import ExpertCatalog

_ALIGN = 64
_STEP = 16 << 20


@dataclass(frozen=True)
class Front:
    """A device, and what its tier of experts is to be."""

    device: Device
    slots: Sequence[int]  # of each size group
    policy: EvictionPolicy

    def open(
        self,
        pool: SlotPool,
        host: HostSlots,
        cache: ExpertCache,
        catalog: ExpertCatalog,
        experts: PooledExperts,
    ) -> Tiers:
        """The tiers over a pool in RAM, which is pinned. experts: of one layer, to measure with.

        Raises LibraryError where it cannot be.
        """
        slots = DeviceSlots(self.device, pool, self.slots, catalog)
        self.policy.bind(sizing.residency_for(catalog, self.slots))
        self.device.pin(pool.regions)
        latency = None if self.device.exact else measure_latency(self.device, slots, host, experts)
        self.device.copied_bytes, self.device.copy_seconds = 0, 0.0
        return Tiers(self.device, slots, self.policy, cache, host, latency)


def measure_latency(device: Device, slots: DeviceSlots, host: HostSlots, experts: PooledExperts) -> Latency:
    """What one expert costs: to copy, and to compute on the device and on the CPU."""
    there, here = slots.of(0, 0), host.of(0, 0)
    pairs = [(there[name], weight) for name, weight in here.items()]

    def copy() -> None:
        device.copy(pairs)
        device.settle()

    def run(weights: Weights, tokens: int) -> None:
        hidden, scores = experts.example(weights, tokens)
        with torch.inference_mode():
            experts.compute(0, weights, hidden, scores)
        device.finish()

    return measure(copy, lambda: run(there, 1), lambda n: run(here, n), TOKENS)


def device_slots(vram: str | int, catalog: ExpertCatalog, free: int, fixed: int) -> list[int]:
    """Slots of each size group for "50%" (of the experts), or for a size of all that the model takes on the device.

    free: bytes of the device that are free. fixed: bytes that the model takes there beside experts. Raises UsageError
    and BudgetError.
    """
    text = str(vram).strip()
    sizes = sizing.slot_bytes(catalog, _ALIGN)
    if text.endswith("%"):
        slots = sizing.parse_cache(text, catalog, _ALIGN)
    else:
        least, given = fixed + sizing.least_pool(catalog, _ALIGN), parse_bytes(text)
        if given < least:
            raise BudgetError(
                f"--vram {format_bytes(given)} is too small for this model: the smallest that works is "
                f"{_mebibytes(least)}MiB (or lower -c)"
            )
        slots = sizing.slots_for(catalog, given - fixed, _ALIGN)
    need = fixed + sum(size * n for size, n in zip(sizes, slots, strict=True))
    if need > free:
        raise BudgetError(
            f"--vram {text} needs {format_bytes(need)} of the GPU's memory, {format_bytes(fixed)} of it for what is no "
            f"expert, and {format_bytes(free)} are free: lower --vram or -c, or end other programs"
        )
    return slots


def _mebibytes(nbytes: int) -> int:
    """A round number of them that holds `nbytes`."""
    return -(-nbytes // _STEP) * _STEP >> 20
