"""What the command line imports before it knows what is asked of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams(closed: str, tmp_path: Path) -> None:
    """The next file that is opened must not be taken for one of them: here the report."""
    command = (
        f"{sys.executable} -m flashmoe.cli run demo -p x -n 1 -t 1 --json {tmp_path / 'report'} {closed}"
    )
    assert subprocess.run(command, shell=True, stdin=subprocess.DEVNULL).returncode == 0
    assert json.loads((tmp_path / "report").read_text())["text"]
