"""What the command line imports before it knows what is asked of it."""

from __future__ import annotations

import json
import os
import shutil
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


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = f"cd {tmp_path}/gone && rmdir ../gone && exec {sys.executable} -m flashmoe.cli plan demo"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "the current folder is not there any more: cd to another" in done.stderr


NO_PROC = "mount -t tmpfs none /proc"


def without_proc(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{NO_PROC} && {command}"], capture_output=True, text=True
    )


@pytest.mark.skipif(
    not shutil.which("unshare") or without_proc("true").returncode != 0, reason="mounting needs root"
)
def test_a_system_without_proc(tmp_path: Path) -> None:
    """What is known there only is not: it runs all the same, and `doctor` says so."""
    python = f"exec {sys.executable} -m flashmoe.cli"
    done = without_proc(f"{python} run demo -p x -n 1 -t 1 --chat --json {tmp_path / 'report'}")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report").read_text())["decode"]["tokens"] >= 0
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 300 << 20)  # else one is written
    done = without_proc(f"{python} doctor {tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "/proc cannot be read" in done.stdout
