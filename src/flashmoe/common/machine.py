"""Facts about the machine."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from contextlib import suppress
from pathlib import Path

import psutil

from flashmoe.common.cgroup import processor_quota

_PROCESSORS = "/sys/devices/system/cpu"


def processor() -> str:
    """The processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def processor_flags() -> frozenset[str]:
    """Its features, as the kernel names them; none where the system does not tell."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def _cpuinfo(field: str) -> str:
    """What the system says of the first core; "" for nothing."""
    try:
        match = re.search(rf"^{field}\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return match[1] if match else ""


def instructions() -> str:
    """A short name for the processor's set of instructions, the same on machines with the same."""
    names = " ".join(sorted(processor_flags())) or platform.machine()
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def physical_cores() -> int:
    """Cores of the machine; logical ones where these cannot be told."""
    try:
        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    except OSError:  # neither /sys nor /proc
        return os.cpu_count() or 1


def cores() -> int:
    """Compute threads that are worth starting: the cores that this process may use, and the time it may use them.

    Its affinity (taskset, cpusets of containers) may leave it some of the machine's, and a quota of its control group
    less than their time: threads beyond that wait for each other while none of them may run.
    """
    allowed = allowed_cores()
    quota = processor_quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def allowed_cores() -> int:
    """Physical cores that this process may run on; logical ones where these cannot be told."""
    try:
        logical = os.sched_getaffinity(0)
    except (AttributeError, OSError):
        return physical_cores()
    siblings = {_siblings(number) for number in logical}
    if "" in siblings:
        return max(1, min(physical_cores(), len(logical)))
    return max(1, len(siblings))


def _siblings(processor: int) -> str:
    """Which logical processors share a core with one; "" where the system does not tell."""
    for name in ("core_cpus_list", "thread_siblings_list"):  # of Linux 5.x, and before
        try:
            return (Path(_PROCESSORS) / f"cpu{processor}/topology" / name).read_text().strip()
        except OSError:
            continue
    return ""


def seconds_without_core() -> float:
    """What the threads of this process have waited for a core so far, all together; 0 where the system does not tell.

    Of threads that have ended, nothing.
    """
    nanoseconds = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, IndexError, ValueError):
            nanoseconds += int(thread.read_text().split()[1])
    return nanoseconds / 1e9


def file_system(path: Path) -> str:
    """Type of the file system that a file is on, for example "ext4"; "" where the system does not tell."""
    try:
        resolved, partitions = path.resolve(), psutil.disk_partitions(all=True)
    except OSError:
        return ""
    mounts = [p for p in partitions if resolved.is_relative_to(p.mountpoint)]
    return max(mounts, key=lambda p: len(p.mountpoint)).fstype if mounts else ""
