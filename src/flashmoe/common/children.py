"""The command that runs a module of this package in a child process."""

from __future__ import annotations

import sys

# Python looks for modules in the current folder first, and whatever lies there would be run: a random.py, a numpy/
_PROGRAM = (
    "import sys; sys.path = [place for place in sys.path if place]; import runpy; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module with this Python, and nothing of the current folder."""
    return [sys.executable, "-c", _PROGRAM, module, *arguments]
