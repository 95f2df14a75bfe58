"""What a command has found out: lines for the reader, and the file that `--json` names."""

from __future__ import annotations

import json
import math
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import typer
from rich.console import Console

from flashmoe.common.files import write_atomically
from flashmoe.errors import FlashMoEError

if TYPE_CHECKING:
    from flashmoe.runtime.telemetry import Report


def show(console: Console, report: Report) -> None:
    """Print the report's lines."""
    for line in report.lines():
        console.print(line, style="dim", highlight=False)


class JsonFile:
    """Where a command writes its report as JSON: a file, which is replaced as a whole, or standard output."""

    def __init__(self, name: str) -> None:
        """name: of the file, or "-" for what is standard output now."""
        self._path = None if name == "-" else Path(name)
        self._stdout: IO[str] = sys.stdout

    @property
    def to_stdout(self) -> bool:
        return self._path is None

    def write(self, report: Any) -> None:
        """Write a report of dicts, lists, numbers and text. Raises FlashMoEError where that is not possible."""
        text = json.dumps(_strict(report), indent=1, allow_nan=False) + "\n"
        if self._path is None:
            self._stdout.write(text)
            self._stdout.flush()
            return
        try:
            write_atomically(self._path, text.encode())
        except OSError as error:
            raise FlashMoEError(f"{self._path}: the report cannot be written ({error.strerror})") from None


def nothing_else_on_stdout(context: typer.Context, file: JsonFile | None) -> JsonFile | None:
    """Callback of `--json`: with "-", all else that the command prints goes to standard error."""
    if file is not None and file.to_stdout:
        context.with_resource(redirect_stdout(sys.stderr))
    return file


def _strict(value: Any) -> Any:
    """The same without numbers that JSON does not have (infinite, not a number): null in their place."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _strict(item) for name, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, (list, tuple)) else value
