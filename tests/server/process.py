"""A real server process, for tests and benchmarks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI


class ServerProcess:
    """`flashmoe serve MODEL ARGUMENTS` on a free port; `url` is its address."""

    def __init__(
        self,
        model: Path | str,
        *arguments: object,
        env: Mapping[str, str] | None = None,
        program: Sequence[str] = ("-m", "flashmoe.cli"),
    ) -> None:
        options = ["--port", 0, "-t", 1, *arguments]
        self._process = subprocess.Popen(
            [sys.executable, *program, "serve", str(model), *map(str, options)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200", **(env or {})},
        )
        self.messages: list[str] = []
        self.url = ""
        assert self._process.stderr
        for line in self._process.stderr:
            self.messages.append(line.rstrip())
            if found := re.search(r"http://\S+(?=/v1)", line):
                self.url = found[0]
                break
        assert self.url, self.messages
        self._drain = threading.Thread(target=self._read, daemon=True)
        self._drain.start()

    def _read(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            self.messages.append(line.rstrip())

    @property
    def pid(self) -> int:
        return self._process.pid

    def client(self, key: str = "none", **options: object) -> OpenAI:
        """The official client; it does not try again by itself."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=600, **options)  # type: ignore[arg-type]

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float = 60) -> int:
        """Its exit status, when it has ended."""
        status = self._process.wait(seconds)
        self._drain.join()
        return status

    def stop(self) -> int:
        """End it in order; its exit status."""
        if self._process.poll() is None:
            self.send_signal(signal.SIGTERM)
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise


@contextmanager
def serving(model: Path | str, *arguments: object, **options: Any) -> Iterator[ServerProcess]:
    """A server as long as the block lasts; it must end without a fault of its own."""
    server = ServerProcess(model, *arguments, **options)
    try:
        yield server
    finally:
        status = server.stop()
    assert status == 0, server.messages
    assert not any("Traceback" in line for line in server.messages), server.messages
