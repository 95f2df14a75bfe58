"""What the command line imports before it knows what is asked of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.runner import flashmoe, own_process

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
    command = f"{sys.executable} -m flashmoe.cli run demo -p x -n 1 -t 1 --temp 0 --json {tmp_path / 'report'} {closed}"
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


@pytest.mark.parametrize(
    ("variables", "arguments", "message"),
    [
        ("NUMBA_NUM_THREADS=0", "policies", "numba cannot be loaded .*unset or mend NUMBA_NUM_THREADS$"),
        ("NUMBA_DISABLE_JIT=1", "plan demo", "NUMBA_DISABLE_JIT is set.*unset it$"),
        ("HF_HUB_ETAG_TIMEOUT=x", "plan hf:a/b", "huggingface_hub cannot be loaded .*HF_HUB_ETAG_TIMEOUT"),
        ("HTTPS_PROXY=bogus://x", "plan hf:a/b", "hf:a/b: the hub cannot be reached .*bogus"),
    ],
)
def test_what_libraries_refuse_in_the_environment(variables: str, arguments: str, message: str) -> None:
    name, _, value = variables.partition("=")
    result = own_process(*arguments.split(), env={"HF_HUB_OFFLINE": "", name: value})
    assert result.status == 1, result
    assert re.search(message, result.message), result.message


def test_warnings_of_libraries_are_a_line() -> None:
    result = own_process("policies", env={"NUMBA_OPT": "none"})  # numba's text has a traceback
    assert result.status == 0
    assert "'NUMBA_OPT' is defined but" in result.message


@pytest.mark.parametrize("columns", ["0", "1", "\u00b2", "9" * 5000])
def test_widths_that_are_none(columns: str) -> None:
    result = flashmoe("policies", env={"COLUMNS": columns, "LINES": columns})
    assert result.status == 0, result.err
    assert "least recently used" in " ".join(result.out.split()) or "lru" in result.out


def test_standard_output_by_its_name_and_a_pipe_without_one() -> None:
    for command in ("--json /dev/stdout", "--json >(cat)", "--json - "):
        line = f"{sys.executable} -m flashmoe.cli predictors -q {command} | cat"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert done.stderr == ""
        assert json.loads(done.stdout)


def test_standard_input_that_cannot_be_read_or_never_ends(tmp_path: Path) -> None:
    for stdin, message in ((f"0>{tmp_path / 'x'}", "cannot be read"), ("</dev/zero", "more than 256 MiB")):
        command = f"{sys.executable} -m flashmoe.cli run demo {stdin}"
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.match(f"error: standard input.*{message}", done.stderr), done.stderr
