"""Machines whose memory lies at several nodes: memory that all cores read is spread over those that have cores.

By default memory lies where the thread runs that touches it first: here a single one, and then the cores of one node
wait for the other's memory, at half of the machine's bandwidth.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NODES, _STATUS = Path("/sys/devices/system/node"), Path("/proc/self/status")
_DEFAULT, _INTERLEAVE = 0, 3  # linux/mempolicy.h
_SYSCALLS = {"x86_64": (237, 238, 239), "aarch64": (235, 237, 236)}  # mbind, set_mempolicy, get_mempolicy


def nodes() -> list[int]:
    """The nodes with memory for this process on whose cores it runs."""
    try:
        with_memory = _numbers((_NODES / "has_memory").read_text())
        allowed = re.search(r"^Mems_allowed_list:\s+(\S+)$", _STATUS.read_text(), re.MULTILINE)
        if allowed:
            with_memory &= _numbers(allowed[1])
        own = os.sched_getaffinity(0)
        return sorted(n for n in with_memory if own & _numbers((_NODES / f"node{n}/cpulist").read_text()))
    except (OSError, ValueError, AttributeError):
        return []


def _numbers(text: str) -> set[int]:
    """Those of a list like "0-3,8"."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def spread(address: int, nbytes: int) -> None:
    """Let memory that has not been touched, from a page's beginning on, lie on all nodes in turn, page by page.

    Does nothing on machines with one node, and where a policy was chosen for this process (numactl).
    """
    if (mask := _mask()) is not None:
        bind, *_ = _SYSCALLS[platform.machine()]
        _call(bind, address, nbytes, _INTERLEAVE, ctypes.addressof(mask), 8 * len(mask) + 1, 0)


@contextmanager
def spreading() -> Iterator[None]:
    """The same for what this thread, and threads that it starts, touch first meanwhile."""
    mask = _mask()
    if mask is None:
        yield
        return
    _, choose, _ = _SYSCALLS[platform.machine()]
    _call(choose, _INTERLEAVE, ctypes.addressof(mask), 8 * len(mask) + 1)
    try:
        yield
    finally:
        _call(choose, _DEFAULT, 0, 0)


def _mask() -> ctypes.Array[ctypes.c_char] | None:
    """The nodes to spread over as bits; None where memory is to lie where it is touched."""
    wanted = nodes()
    if len(wanted) < 2 or platform.machine() not in _SYSCALLS:
        return None
    mode = ctypes.c_int(_DEFAULT)
    _, _, ask = _SYSCALLS[platform.machine()]
    if _call(ask, ctypes.addressof(mode), 0, 0, 0, 0) != 0 or mode.value != _DEFAULT:
        return None
    bits = 0
    for node in wanted:
        bits |= 1 << node
    size = 8 * (wanted[-1] // 64 + 1)
    return (ctypes.c_char * size).from_buffer_copy(bits.to_bytes(size, "little"))


def _call(number: int, *arguments: int) -> int:
    """A system call; -1 where it is refused: then memory lies as it would anyway."""
    with suppress(AttributeError):
        return int(ctypes.CDLL(None).syscall(*(ctypes.c_long(value) for value in (number, *arguments))))
    return -1
