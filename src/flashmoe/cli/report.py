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

from flashmoe.common.files import replaceable, write_atomically
from flashmoe.errors import FlashMoEError, UsageError

if TYPE_CHECKING:
    from flashmoe.runtime.report import Report


def show(console: Console, report: Report) -> None:
    """Print the report's lines."""
    for line in report.lines():
        console.print(line, style="dim", highlight=False)


#: Its names: a file that it leads to must not be replaced, nor hold anything but the report.
_STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


class JsonFile:
    """Where a command writes its report as JSON: a file, which is replaced as a whole, or standard output."""

    def __init__(self, name: str) -> None:
        """name: of the file, or "-" for what is standard output now. Raises UsageError for that of a model or a
        trace, before any work is done."""
        self._path = None if name in _STDOUT else Path(name)
        self._stdout: IO[str] = sys.stdout
        if self._path and not replaceable(self._path):
            raise UsageError(
                f"{self._path} is a model, a trace or a trained file: name another for the report"
            )

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


def no_model_there(path: Path | None) -> Path | None:
    """Callback of an option that names a trace to write. Raises UsageError for the name of something else that took
    hours."""
    if path is not None and not replaceable(path, "flashmoe-routing-trace"):
        raise UsageError(f"{path} is a model or a trained file: name another for the trace")
    return path


def _strict(value: Any) -> Any:
    """The same without numbers that JSON does not have (infinite, not a number): null in their place."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _strict(item) for name, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, (list, tuple)) else value
