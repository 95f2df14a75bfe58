"""Writes the reference of the command line from its real parsers: python scripts/cli_reference.py OUT.md"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from flashmoe.cli import make_app


def lines(command: Any, name: str, parent: Any = None) -> Iterator[str]:
    """A command as Markdown, its subcommands after it; `bench MODEL` is the hidden command `run` of its group."""
    own, above = (name, None) if command.hidden else (name.split()[-1], parent)
    context = command.context_class(command, info_name=own, parent=above)
    commands = getattr(command, "commands", {})
    if parent and not command.hidden:
        yield f"{'#' * name.count(' ')}# `{name}`\n"
    if command.help:
        yield inspect.cleandoc(command.help) + "\n"
    if parent and not commands:
        yield f"```text\n{' '.join(command.get_usage(context).split()).removeprefix('Usage: ')}\n```\n"
        yield "| | default | |\n|---|---|---|"
        for parameter in command.params:
            if parameter.name != "help" and not getattr(parameter, "hidden", False):
                yield row(parameter, context)
        yield ""
    for child, sub in sorted(commands.items(), key=lambda item: (not item[1].hidden, item[0])):
        yield from lines(sub, name if sub.hidden else f"{name} {child}", context)


def row(parameter: Any, context: Any) -> str:
    """A line of a command's table."""
    argument = parameter.param_type_name == "argument"
    spelled = (parameter.name or "").upper() if argument else ", ".join(parameter.opts)
    default = parameter.get_default(context, call=False)
    shown = (
        "required" if parameter.required else "" if default is None or default is False else f"`{default}`"
    )
    text = (getattr(parameter, "help", None) or "").replace("|", "\\|")
    return f"| `{spelled}` | {shown} | {text} |"


def main(target: Path) -> None:
    """Write the page."""
    command = typer.main.get_command(make_app())
    target.write_text("# Command line\n\n" + "\n".join(lines(command, "flashmoe")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
