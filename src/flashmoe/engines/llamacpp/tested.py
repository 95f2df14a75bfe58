"""Runs the self-test of a library with the slot pool, once per library file.

It is `flashmoe.tools.self_test`, which loads a model: it runs in a child process, because a wrong layout crashes.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from flashmoe.common.children import module_command
from flashmoe.common.files import cache_folder, write_atomically
from flashmoe.common.machine import instructions, processor
from flashmoe.engines.llamacpp import abi
from flashmoe.engines.llamacpp.library import ENVIRONMENT, Library, find_library, open_library
from flashmoe.errors import LibraryError

_log = logging.getLogger(__name__)

_TIMEOUT = 120
_VERSION = 4  # of the self-test: a library that has passed an earlier one is tested again


def self_test(library: Path) -> None:
    """Run the self-test of this library file unless it has passed before. Raises LibraryError where it fails."""
    stat = library.stat()
    # another processor may lack instructions: homes and virtual machines move between machines
    fact = f"{library}:{stat.st_size}:{stat.st_mtime_ns}:{_VERSION}:{instructions()}"
    notes = cache_folder() / "libraries.json"
    try:
        passed = list(json.loads(notes.read_text()))
    except (OSError, ValueError, TypeError):
        passed = []
    if fact in passed:
        _log.info("%s: has passed the self-test before", library)
        return
    command = module_command("flashmoe.tools.self_test", str(library))
    try:
        child = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT)
        lines = child.stderr.strip().splitlines() or [f"ended by signal {-child.returncode}"]
        failure = lines[-1] if child.returncode else None
        if child.returncode == -signal.SIGILL:
            raise LibraryError(
                f"{library}: this llama.cpp library uses instructions that the processor ({processor()}) does not "
                f"have; build llama.cpp on this machine and name its libllama.so in {ENVIRONMENT}"
            )
    except subprocess.TimeoutExpired:
        failure = "no answer"
    except OSError as error:  # no more processes, or no memory for one
        failure = f"its process cannot be started: {error.strerror}"
    if failure:
        known = ", ".join(sorted({build.name for build in abi.KNOWN_BUILDS.values()}))
        raise LibraryError(
            f"{library}: this llama.cpp library does not work with the slot pool ({failure}); builds that do: {known}"
        )
    _log.info("%s: has passed the self-test", library)
    with suppress(OSError):  # a home that cannot be written: tested again next time
        write_atomically(notes, json.dumps([*passed, fact], indent=1).encode())


def tested_library() -> Library:
    """The llama.cpp library, after it has passed the self-test once. Raises LibraryError."""
    path = find_library()
    self_test(path)
    return open_library(path)
