"""Anonymous memory that is reserved at once, committed page by page, when touched or asked for, and given back."""

from __future__ import annotations

import ctypes
import mmap
import os
from functools import cache
from pathlib import Path

from flashmoe.common.memory import address_room
from flashmoe.common.units import format_bytes
from flashmoe.errors import BudgetError

# In Python's mmap module from 3.13 on; the value is Linux's on x86 and Arm
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in Python's mmap module
_LOOK = 256 << 20  # bytes whose pages are asked for at once
_PRESENT = bytes(byte & 1 for byte in range(256))  # mincore's lowest bit; the others are reserved

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


@cache
def huge_page() -> int:
    """Bytes of this machine's transparent huge pages; of a usual one where it has none."""
    try:
        return int((_HUGE_PAGES / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 2 << 20


def huge_pages_everywhere() -> bool:
    """Whether large memory is made of huge pages unasked: then touching a byte of it takes one."""
    try:
        return "[always]" in (_HUGE_PAGES / "enabled").read_text()
    except OSError:
        return False


def reserve(nbytes: int) -> tuple[mmap.mmap, int]:
    """Address space for `nbytes`, more than the machine's memory if need be, and its address; page-aligned.

    The memory is freed with the mmap object. Raises BudgetError where even addresses are refused.
    """
    try:
        memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except OSError as error:
        raise refused(nbytes, error) from None
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def reserve_uncounted(nbytes: int) -> tuple[mmap.mmap, int]:
    """Like `reserve`, for far more than is ever touched: where the system counts what it has promised
    (vm.overcommit_memory=2, ulimit -d), shared memory, of which it counts what is touched. Raises BudgetError."""
    try:
        return reserve(nbytes)
    except BudgetError as error:
        try:
            file = os.memfd_create("flashmoe")
            try:
                os.ftruncate(file, max(nbytes, 1))
                memory = mmap.mmap(file, 0)
            finally:
                os.close(file)
        except OSError:
            raise error from None
        return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def check_room(nbytes: int, purpose: str) -> None:
    """Raise BudgetError where addresses are limited and fewer are left: libraries that get no memory end the process,
    or wait for ever."""
    room = address_room()
    if room and room[0] < nbytes:
        left, name = format_bytes(room[0]), room[1]
        raise BudgetError(
            f"{purpose} takes {format_bytes(nbytes)} of addresses, {name} leaves {left}: {_change(name)}"
        )


def refused(nbytes: int, error: OSError) -> BudgetError:
    """The error for addresses that the system refuses: why, and what to do."""
    size, room = format_bytes(nbytes), address_room()
    if room is None:
        return BudgetError(
            f"the system refuses {size} of addresses ({error.strerror}); a smaller --ram may work"
        )
    left, name = room
    change = _change(name)
    return BudgetError(
        f"{size} of virtual memory are refused, {format_bytes(left)} of addresses are left under {name}: {change}, or "
        "give a smaller --ram"
    )


def _change(name: str) -> str:
    """What to do about a limit."""
    return "set it to 0 (sysctl)" if "overcommit" in name else f"raise it ({name} unlimited)"


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


@cache
def _libc() -> ctypes.CDLL:
    """Its functions release Python's lock, which those of mmap objects do not."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    return libc


def commit(address: int, nbytes: int) -> bool:
    """Have memory at a page's beginning present; whether the system can do that (Linux 5.14)."""
    return bool(_libc().madvise(address, nbytes, _MADV_POPULATE_WRITE) == 0)


def give_back(address: int, nbytes: int) -> None:
    """Free the whole pages among `nbytes` of reserved memory; where they are touched again, they are zero."""
    first, end = (
        -(-address // mmap.PAGESIZE) * mmap.PAGESIZE,
        (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE,
    )
    if end > first:
        _libc().madvise(first, end - first, mmap.MADV_DONTNEED)


def absent_bytes(address: int, nbytes: int) -> int:
    """How much of reserved memory, from a page's beginning on, is not present; 0 where that cannot be told."""
    absent = 0
    for done in range(0, nbytes, _LOOK):
        pages = -(-min(_LOOK, nbytes - done) // mmap.PAGESIZE)
        present = ctypes.create_string_buffer(pages)
        if _libc().mincore(address + done, pages * mmap.PAGESIZE, present) != 0:
            return 0
        absent += pages - present.raw[:pages].translate(_PRESENT).count(1)
    return absent * mmap.PAGESIZE
