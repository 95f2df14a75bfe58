"""Anonymous memory that is reserved at once and committed page by page, when touched."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from pathlib import Path

# In Python's mmap module from 3.13 on; the value is Linux's on x86 and Arm
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)

_HUGE_PAGE_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")


@cache
def huge_page() -> int:
    """Bytes of this machine's transparent huge pages; of a usual one where it has none."""
    try:
        return int(_HUGE_PAGE_SIZE.read_text())
    except (OSError, ValueError):
        return 2 << 20


def reserve(nbytes: int) -> tuple[mmap.mmap, int]:
    """Address space for `nbytes`, more than the machine's memory if need be, and its address; page-aligned.

    The memory is freed with the mmap object. Raises OSError where even addresses are refused.
    """
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def reserve_huge(nbytes: int) -> tuple[mmap.mmap, int]:
    """Like `reserve`, at an address where huge pages can lie, and advised so as far as they are filled."""
    page = huge_page()
    if nbytes < page:
        return reserve(nbytes)
    memory, start = reserve(nbytes + page)
    aligned = -(-start // page) * page
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE, aligned - start, nbytes // page * page)
    return memory, aligned
