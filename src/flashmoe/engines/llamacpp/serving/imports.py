"""The import slots of a loaded library: where it looks up the address of a function that it calls by name.

ELF's procedure linkage table jumps through one slot per imported function, also for functions of the library itself
that it exports. The dynamic section of the library, as it lies in memory, says where the slots are (System V ABI, gABI
chapter 5).
"""

from __future__ import annotations

import ctypes as C
import mmap
from collections.abc import Iterator

import numpy as np

from flashmoe.errors import LibraryError

_DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_JMPREL = 2, 5, 6, 23
_SYMBOL_BYTES = 24  # Elf64_Sym, which begins with the offset of its name
_RTLD_DI_LINKMAP = 2


class _LinkMap(C.Structure):
    """struct link_map of <link.h>"""

    _fields_ = [("base", C.c_size_t), ("name", C.c_char_p), ("dynamic", C.c_void_p)]


class ImportSlot:
    """The slot of one function: `address` is what its calls jump to."""

    def __init__(self, place: int) -> None:
        self._cell = C.c_size_t.from_address(place)
        page = place & -mmap.PAGESIZE
        libc = C.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = [C.c_void_p, C.c_size_t, C.c_int]
        if libc.mprotect(page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE):
            raise LibraryError(
                "the library's import slots cannot be made writable: its server cannot be used"
            )

    @property
    def address(self) -> int:
        return self._cell.value

    @address.setter
    def address(self, address: int) -> None:
        self._cell.value = address


def import_slots(library: C.CDLL, names: set[str]) -> dict[str, ImportSlot]:
    """The slots of `names` in a loaded library. Raises LibraryError where one has none."""
    found = {name: ImportSlot(place) for name, place in _slots(library) if name in names}
    if missing := names - found.keys():
        raise LibraryError(
            f"{library._name}: calls {', '.join(sorted(missing))} in a way that FlashMoE cannot redirect: its server "
            "cannot run over the expert pool"
        )
    return found


def _slots(library: C.CDLL) -> Iterator[tuple[str, int]]:
    """Name and place of every slot."""
    link = _link_map(library)
    entries = {}
    at = link.dynamic or 0
    while (tag := C.c_int64.from_address(at).value) != 0:
        entries[tag] = C.c_size_t.from_address(at + 8).value
        at += 16
    try:
        size, relocations = entries[_DT_PLTRELSZ], entries[_DT_JMPREL]
        symbols, strings = entries[_DT_SYMTAB], entries[_DT_STRTAB]
    except KeyError:
        return
    rows = np.ctypeslib.as_array((C.c_int64 * (size // 8)).from_address(relocations)).reshape(-1, 3)
    for offset, info in rows[:, :2].tolist():  # Elf64_Rela: offset, symbol << 32 | type, addend
        name = C.c_uint32.from_address(symbols + _SYMBOL_BYTES * (info >> 32)).value
        yield C.string_at(strings + name).decode("latin-1"), link.base + offset


def _link_map(library: C.CDLL) -> _LinkMap:
    address = C.c_void_p()
    dlinfo = C.CDLL(None).dlinfo
    dlinfo.argtypes = [C.c_void_p, C.c_int, C.c_void_p]
    if dlinfo(library._handle, _RTLD_DI_LINKMAP, C.byref(address)) or not address.value:
        raise LibraryError(f"{library._name}: the system does not say where it lies")
    return _LinkMap.from_address(address.value)
