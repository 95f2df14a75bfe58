"""Anonymous memory that is reserved at once and committed page by page, when touched."""

from __future__ import annotations

import ctypes
import mmap

# In Python's mmap module from 3.13 on; the value is Linux's on x86 and Arm
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


HUGE_PAGE = 2 << 20


def reserve(nbytes: int) -> tuple[mmap.mmap, int]:
    """Address space for `nbytes`, more than the machine's memory if need be, and its address; page-aligned.

    The memory is freed with the mmap object. Raises OSError where even addresses are refused.
    """
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def reserve_huge(nbytes: int) -> tuple[mmap.mmap, int]:
    """Like `reserve`, at an address where huge pages can lie, and advised so."""
    memory, start = reserve(nbytes + HUGE_PAGE)
    if nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, -(-start // HUGE_PAGE) * HUGE_PAGE
