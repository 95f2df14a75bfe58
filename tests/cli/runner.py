"""Runs the command line as its users do, in this process (a second each is saved) or in one of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest.mock import patch

from flashmoe.cli import main

COMMAND = (sys.executable, "-m", "flashmoe.cli")


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one line of an error."""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1, self.err
        return lines[0]


def flashmoe(*arguments: object, stdin: str | None = None, env: Mapping[str, str] | None = None) -> Result:
    """`flashmoe ARGUMENTS` through its entry point; without `stdin`, standard input is at its end.

    What escapes from the entry point fails the test: a user would see it as a traceback.
    """
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", ["flashmoe", *map(str, arguments)]),
        patch.object(sys, "stdin", io.StringIO(stdin or "")),
        patch.dict(os.environ, env or {}),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(bool(end.code))
    return Result(status, out.getvalue(), err.getvalue())


def own_process(
    *arguments: object,
    stdin: str | bytes | None = None,
    env: Mapping[str, str] | None = None,
    encoding: str | None = "utf-8",
    timeout: float = 120,
) -> Result:
    """The same as a process of its own. encoding: of its output; None where it may be any, or broken."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=(stdin or "").encode() if not isinstance(stdin, bytes) else stdin,
        capture_output=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
    )
    out, err = (
        data.decode(encoding or "utf-8", "strict" if encoding else "replace")
        for data in (done.stdout, done.stderr)
    )
    return Result(done.returncode, out, err)
