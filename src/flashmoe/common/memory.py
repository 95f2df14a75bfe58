"""Memory: what the process may use, and what it uses."""

from __future__ import annotations

import ctypes
import mmap
import re
import resource
from pathlib import Path

import psutil

DEFAULT_SHARE = 0.7  # of the memory that is available: the machine stays usable
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


def memory_limit() -> int:
    """Bytes this process may use at most: the machine's memory, or its cgroup's limit where that is lower."""
    limits = [psutil.virtual_memory().total]
    try:
        entries = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return limits[0]
    for _, controllers, path in entries:
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        folder = root / path.strip("/")
        for place in (folder, *folder.parents):
            if root not in (place, *place.parents):
                break
            try:
                text = (place / name).read_text().strip()
            except OSError:
                continue
            if text.isdigit():
                limits.append(int(text))
    return min(limits)


def default_ram() -> int:
    """The budget where none is given: a share of the memory available to this process."""
    return int(DEFAULT_SHARE * min(psutil.virtual_memory().available, memory_limit()))


def status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes (VmRSS, VmHWM, VmData, RssAnon); 0 where it does not exist."""
    try:
        match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return int(match[1]) << 10 if match else 0


def major_faults() -> int:
    """Pages of this process that had to be read back from disk so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
