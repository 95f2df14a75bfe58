"""Memory: what the process may use, and what it uses."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from flashmoe.common.cgroup import groups

DEFAULT_SHARE = 0.7  # of the memory that is available: the machine stays usable
_M_ARENA_MAX = -8  # malloc.h
_MADV_PAGEOUT = 21  # Linux 5.4; not in Python's mmap module


def release_code() -> None:
    """Take the pages of libraries out of this process's memory; those still in use come back by themselves.

    Compilers and loaders that have done their work leave 80 MiB behind. Does nothing where there is no /proc.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for fields in (line.split(maxsplit=5) for line in lines):
        # code is never changed; read-only data may hold relocated addresses, which only PAGEOUT leaves alone
        advice = {"r-xp": mmap.MADV_DONTNEED, "r--p": _MADV_PAGEOUT}.get(fields[1])
        if advice is not None and len(fields) == 6 and fields[5].startswith("/"):
            start, end = (int(address, 16) for address in fields[0].split("-"))
            madvise(start, end - start, advice)


def machine_memory() -> tuple[int, int]:
    """Bytes of the machine's memory, and bytes of it that are available; those that are free where the system does not
    tell (no /proc, or a part of it that cannot be read)."""
    try:
        machine = psutil.virtual_memory()
        return machine.total, machine.available
    except (OSError, KeyError, ValueError):
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")


def memory_limit() -> int:
    """Bytes this process may use at most: the machine's memory, or its cgroup's limit where that is lower."""
    return min((limit for limit, _ in _group_limits()), default=machine_memory()[0])


def memory_left() -> int:
    """Bytes that are free for this process: of the machine, and of each control group around it, which it may share.

    Page cache is free: the system gives it back.
    """
    left = [limit - used for limit, used in _group_limits()]
    return max(0, min(*machine_memory(), *left))


def stalled_seconds() -> float:
    """How long programs have had to wait for memory so far, in this process's control group or on the machine; 0 where
    the system does not tell (Linux before 4.20, or without PSI)."""
    own = [folder / "memory.pressure" for version, folder in groups("memory") if version == 2][:1]
    for file in (*own, Path("/proc/pressure/memory")):
        with suppress(OSError):
            if match := re.search(r"^some .*total=(\d+)", file.read_text(), re.MULTILINE):
                return int(match[1]) / 1e6
    return 0.0


def _group_limits() -> Iterator[tuple[int, int]]:
    """Of each control group around this process with a limit: bytes of it, and bytes that are used, by all in it."""
    total = machine_memory()[0]
    for version, folder in groups("memory"):
        names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
        limits = [limit for name in names if 0 < (limit := _number(folder / name)) < total]
        if limits:
            yield min(limits), _used(folder, version)


def _used(folder: Path, version: int) -> int:
    """Bytes that a control group uses, without page cache."""
    used = _number(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
    prefix = "" if version == 2 else "total_"
    names = (f"{prefix}active_file", f"{prefix}inactive_file")
    try:
        fields = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = sum(int(line[1]) for line in fields if len(line) == 2 and line[0] in names)
    except (OSError, ValueError):
        cached = 0
    return max(0, used - cached)


def _number(path: Path) -> int:
    """The number that a file holds; 0 where it holds none, or is not there."""
    try:
        text = path.read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0


def address_room() -> tuple[int, str] | None:
    """Bytes that this process may still reserve, and what limits them: ulimit -v, ulimit -d, or a system that promises
    no more memory than it has. None where nothing does."""
    rooms = []
    for resource_limit, field, name in (
        (resource.RLIMIT_AS, "VmSize", "ulimit -v"),
        (resource.RLIMIT_DATA, "VmData", "ulimit -d"),
    ):
        most = resource.getrlimit(resource_limit)[0]
        if most != resource.RLIM_INFINITY:
            rooms.append((max(0, most - status_bytes(field)), name))
    if counts_promises():
        most, promised = (status_bytes(name, "/proc/meminfo") for name in ("CommitLimit", "Committed_AS"))
        rooms.append((max(0, most - promised), "vm.overcommit_memory=2"))
    return min(rooms, default=None)


def counts_promises() -> bool:
    """Whether the system refuses to promise more memory than it has (vm.overcommit_memory=2)."""
    return _number(Path("/proc/sys/vm/overcommit_memory")) == 2


def default_ram() -> int:
    """The budget where none is given: what this process has, and a share of what it may have beside that."""
    budget = status_bytes("RssAnon") + int(DEFAULT_SHARE * memory_left())
    if room := address_room():  # its libraries have their addresses
        budget = min(budget, status_bytes("VmRSS") + int(DEFAULT_SHARE * room[0]))
    return budget


def spare_addresses() -> None:
    """Where addresses are limited, take fewer of them: each thread that allocates would reserve 64 MiB, and each one of
    numpy's 32 MiB. Call it early."""
    if address_room():
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        with suppress(AttributeError):  # another libc than GNU's
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def status_bytes(field: str, file: str = "/proc/self/status") -> int:
    """A field of a process's status in bytes (VmRSS, VmHWM, VmData, RssAnon); 0 where it does not exist."""
    try:
        match = re.search(rf"^{field}:\s+(\d+) kB", Path(file).read_text(), re.MULTILINE)
    except OSError:
        match = None
    return int(match[1]) << 10 if match else 0


def major_faults() -> int:
    """Pages of this process that had to be read back from disk so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
