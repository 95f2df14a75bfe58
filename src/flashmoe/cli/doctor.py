"""`flashmoe doctor`: whether this machine can run models well, and what to change."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from flashmoe.cli import options
from flashmoe.cli.progress import stdout_console
from flashmoe.common.text import printable

_STYLES = {"ok": "green", "advice": "yellow", "problem": "bold red"}


def doctor(
    place: Annotated[
        Path, typer.Argument(help="Model file or folder for models; its drive is measured.")
    ] = Path(),
    json_file: options.Json = None,
    quiet: options.Silent = False,
) -> None:
    """Check library, processor, memory and drive, and suggest changes. Exit status 1: a check failed."""
    from flashmoe.tools.doctor import PROBLEM, examine

    console = stdout_console(quiet)
    checks = []
    for check in examine(place):
        checks.append(check)
        name = Text.assemble((f"{check.status:8}", _STYLES[check.status]), f" {check.name:10}")
        console.print(name + printable(check.text), soft_wrap=True)
        if check.change:
            console.print(" " * 19 + printable(check.change), soft_wrap=True)
    if json_file:
        json_file.write([asdict(check) for check in checks])
    if any(check.status == PROBLEM for check in checks):
        raise typer.Exit(1)
