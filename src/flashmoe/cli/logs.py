"""Log records on stderr: those of all modules with --verbose, else only the server's warnings."""

from __future__ import annotations

import logging

import typer
from rich.text import Text

from flashmoe.cli.progress import stderr_console

_STYLES = {logging.INFO: "dim", logging.WARNING: "yellow", logging.ERROR: "red"}


class ConsoleHandler(logging.Handler):
    """Prints records above what else is shown on the terminal."""

    def __init__(self) -> None:
        super().__init__()
        self._console = stderr_console(quiet=False)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._console.print(Text(self.format(record), style=_STYLES.get(record.levelno, "")))
        except Exception:
            self.handleError(record)


def show_logs(context: typer.Context, verbose: bool) -> bool:
    """Callback of --verbose: show log records until the command has ended."""
    logger, handler = logging.getLogger("flashmoe" if verbose else "flashmoe.server"), ConsoleHandler()
    before = logger.level
    if verbose:
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.setLevel(logging.INFO)
    else:
        handler.setLevel(logging.WARNING)
    logger.addHandler(handler)

    def hide() -> None:
        logger.removeHandler(handler)
        logger.setLevel(before)

    context.call_on_close(hide)
    return verbose
