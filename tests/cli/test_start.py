"""What the command line imports before it knows what is asked of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: They take longer to import than all the rest.
HEAVY = (
    "aiohttp",
    "huggingface_hub",
    "matplotlib",
    "numba",
    "numpy",
    "torch",
    "transformers",
    "uvicorn",
    "xllamacpp",
)
PROGRAM = f"""
import atexit, sys
from flashmoe.cli import main
atexit.register(lambda: print("imported:", *sorted(set({HEAVY}) & set(sys.modules))))
main()
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["run", "--help"], ["simulate", "--help"], ["plann"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True)
    assert done.returncode == (2 if arguments == ["plann"] else 0), done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"
