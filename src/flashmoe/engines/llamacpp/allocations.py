"""Replaces, for a while, the function by which the library allocates tensors on the CPU."""

from __future__ import annotations

import ctypes as C
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flashmoe.engines.llamacpp.abi import ptr
from flashmoe.engines.llamacpp.library import Library

Allocate = Callable[
    [int, int], int | None
]  # (buffer type, bytes) -> address of a ggml_backend_buffer, or None
_FUNCTION = C.CFUNCTYPE(ptr, ptr, C.c_size_t)


@contextmanager
def allocating(lib: Library, allocate: Callable[[Allocate], Allocate]) -> Iterator[None]:
    """Let the library call what `allocate` makes of its own function. What is made must not raise."""
    interface = lib.structs["ggml_backend_buffer_type"].from_address(lib.ggml_backend_cpu_buffer_type()).iface
    before = interface.alloc_buffer
    function = _FUNCTION(allocate(_FUNCTION(before)))
    interface.alloc_buffer = C.cast(function, ptr).value
    try:
        yield
    finally:
        interface.alloc_buffer = before


@contextmanager
def counting(lib: Library) -> Iterator[list[int]]:
    """Gives the sizes of what is allocated."""
    sizes: list[int] = []

    def counted(original: Allocate) -> Allocate:
        def allocate(address: int, size: int) -> int | None:
            sizes.append(size)
            return original(address, size)

        return allocate

    with allocating(lib, counted):
        yield sizes
