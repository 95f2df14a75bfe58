"""The report of a run: what the user reads, and the file that `--json` names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from flashmoe.common.files import write_atomically
from flashmoe.errors import FlashMoEError

if TYPE_CHECKING:
    from flashmoe.runtime.telemetry import Report


def show(console: Console, report: Report) -> None:
    """Print the report's lines."""
    for line in report.lines():
        console.print(line, style="dim", highlight=False)


def write_json(path: Path, report: object) -> None:
    """Write a report, of a run or of another command. Raises FlashMoEError where that is not possible."""
    try:
        write_atomically(path, json.dumps(report, indent=1).encode() + b"\n")
    except OSError as error:
        raise FlashMoEError(f"{path}: the report cannot be written ({error.strerror})") from None
