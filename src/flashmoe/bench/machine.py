"""What a result was measured on."""

from __future__ import annotations

import os
import platform
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from flashmoe import __version__
from flashmoe.bench.opponent import read_ahead


def describe(model: Path, library: str, threads: int) -> dict[str, Any]:
    """The machine, the drive that the model is on, and the versions."""
    ahead = read_ahead(model)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": threads,
        "ram_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "library": library,
        "flashmoe": __version__,
        "file_system": file_system(model),
        "read_ahead_bytes": ahead,
    }


def processor() -> str:
    """The processor's name."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def file_system(path: Path) -> str:
    """Type of the file system that a file is on, for example "ext4"."""
    resolved = path.resolve()
    mounts = [p for p in psutil.disk_partitions(all=True) if resolved.is_relative_to(p.mountpoint)]
    return max(mounts, key=lambda p: len(p.mountpoint)).fstype if mounts else ""
