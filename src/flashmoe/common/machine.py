"""Facts about the machine."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import psutil


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


def cores() -> int:
    """Physical cores, as many compute threads as are worth starting; logical ones where these cannot be told."""
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def file_system(path: Path) -> str:
    """Type of the file system that a file is on, for example "ext4"."""
    resolved = path.resolve()
    mounts = [p for p in psutil.disk_partitions(all=True) if resolved.is_relative_to(p.mountpoint)]
    return max(mounts, key=lambda p: len(p.mountpoint)).fstype if mounts else ""
