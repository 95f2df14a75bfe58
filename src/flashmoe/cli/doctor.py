"""`flashmoe doctor`: whether this machine can run models well, and what to change."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flashmoe.cli import options

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

    console = Console(soft_wrap=True, highlight=False, quiet=quiet)
    checks = []
    for check in examine(place):
        checks.append(check)
        console.print(f"[{_STYLES[check.status]}]{check.status:8}[/] {check.name:10}", end="")
        console.print(check.text, markup=False)
        if check.change:
            console.print(" " * 19 + check.change, markup=False)
    if json_file:
        json_file.write([asdict(check) for check in checks])
    if any(check.status == PROBLEM for check in checks):
        raise typer.Exit(1)
