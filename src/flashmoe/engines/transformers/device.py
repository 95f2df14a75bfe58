"""The device that a model computes on and that has the first tier of experts: all that is special to its kind.

`CudaDevice` copies on a stream of its own: compute waits for copies, and copies for compute, by events, so that the CPU
waits for neither. `HostDevice` is this machine's memory in the part of a device: its copies are copies, done when the
call returns. It is what the tiers are tested with where there is no GPU; no user is offered it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch

from flashmoe.common.memory import machine_memory
from flashmoe.errors import LibraryError, UsageError

Regions = Sequence[tuple[int, int]]  # address and bytes of each


class Device(Protocol):
    """A device that holds dense weights, KV cache and a pool of experts."""

    place: torch.device
    #: Whether experts are to be computed by the library's own forward, which asks the device for every expert.
    exact: bool
    #: Bytes copied to it so far, and the seconds that these copies took.
    copied_bytes: int
    copy_seconds: float

    def free_bytes(self) -> int:
        """Memory that a tensor could take now."""

    def phase(self, address: int) -> int:
        """How far from a cache line's beginning weights are to lie that have been read to `address`."""

    def pin(self, regions: Regions) -> None:
        """Make memory of this process a source of fast copies. Raises LibraryError."""

    def unpin(self) -> None:
        """Undo `pin`: before the memory is given back."""

    def follow(self) -> None:
        """Copies from here on begin when all that has been queued for computing so far is done."""

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy weights, (target on the device, source), perhaps while it computes."""

    def use(self) -> None:
        """What is queued for computing from here on sees all copies so far."""

    def settle(self) -> None:
        """Return when all copies have ended: their sources may be overwritten."""

    def finish(self) -> None:
        """Return when all that was queued has been computed."""


class HostDevice:
    """The machine's own memory as a device."""

    exact = True

    def __init__(self) -> None:
        self.place = torch.device("cpu")
        self.copied_bytes, self.copy_seconds = 0, 0.0

    def free_bytes(self) -> int:
        return machine_memory()[1]

    def phase(self, address: int) -> int:
        return address % 64  # kernels for the CPU round by it

    def pin(self, regions: Regions) -> None:
        pass

    def unpin(self) -> None:
        pass

    def follow(self) -> None:
        pass

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        began = time.perf_counter()
        for target, source in pairs:
            target.copy_(source)
            self.copied_bytes += source.nbytes
        self.copy_seconds += time.perf_counter() - began

    def use(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def finish(self) -> None:
        pass


class CudaDevice:
    """One CUDA GPU, the current one of torch."""

    exact = False  # the library's forward waits for the GPU twice per expert

    def __init__(self) -> None:
        self.place = torch.device("cuda", torch.cuda.current_device())
        self.copied_bytes, self.copy_seconds = 0, 0.0
        self._copies = torch.cuda.Stream(self.place)
        self._timed: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._pinned: list[int] = []

    def free_bytes(self) -> int:
        # what torch has reserved and does not use is free to tensors
        kept = torch.cuda.memory_reserved(self.place) - torch.cuda.memory_allocated(self.place)
        return int(torch.cuda.mem_get_info(self.place)[0] + kept)

    def phase(self, address: int) -> int:
        return 0  # the widest loads need aligned weights

    def pin(self, regions: Regions) -> None:
        runtime = torch.cuda.cudart()
        for address, nbytes in regions:
            status = int(runtime.cudaHostRegister(address, nbytes, 0))
            if status:
                self.unpin()
                raise LibraryError(
                    f"the pool in RAM cannot be pinned for copies to the GPU (CUDA error {status}): lower --ram, "
                    "or raise the limit of locked memory (ulimit -l)"
                )
            self._pinned.append(address)

    def unpin(self) -> None:
        self.settle()
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop())

    def follow(self) -> None:
        self._copies.wait_stream(torch.cuda.current_stream(self.place))

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._copies):
            began.record()
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
                self.copied_bytes += source.nbytes
            ended.record()
        self._timed.append((began, ended))

    def use(self) -> None:
        torch.cuda.current_stream(self.place).wait_stream(self._copies)

    def settle(self) -> None:
        self._copies.synchronize()
        self.copy_seconds += sum(began.elapsed_time(ended) for began, ended in self._timed) / 1e3
        self._timed.clear()

    def finish(self) -> None:
        torch.cuda.synchronize(self.place)


def open_device() -> Device:
    """The GPU. Raises UsageError where torch has none."""
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        raise UsageError(f"--vram needs a CUDA GPU, and {built}: leave it away to compute on the CPU")
    return CudaDevice()
