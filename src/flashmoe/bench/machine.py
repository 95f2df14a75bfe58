"""What a result was measured on."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from flashmoe import __version__
from flashmoe.bench.baseline import read_ahead
from flashmoe.common.machine import cores, file_system, processor
from flashmoe.common.memory import machine_memory


def describe(model: Path, library: str, kernels: str, threads: int) -> dict[str, Any]:
    """The machine, the drive that the model is on, the versions, and what computed on both sides."""
    ahead = read_ahead(model)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": cores(),
        "threads": threads,
        "ram_bytes": machine_memory()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "library": library,
        "kernels": kernels,
        "flashmoe": __version__,
        "file_system": file_system(model),
        "read_ahead_bytes": ahead,
    }
