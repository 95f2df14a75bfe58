"""Asks for the proof that the slot pool works with a library, once per library file.

The proof itself, `flashmoe.tools.self_test`, loads a model: it runs in a child process, because a wrong layout crashes.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from flashmoe.common.files import cache_folder, write_atomically
from flashmoe.engines.llamacpp import abi
from flashmoe.engines.llamacpp.library import Library, find_library, open_library
from flashmoe.errors import LibraryError

_log = logging.getLogger(__name__)

_TIMEOUT = 120
_PROOF = 3  # counts what is proven: a library that has shown less is proven again


def prove(library: Path) -> None:
    """Run the proof for this library file unless it has been run before. Raises LibraryError where it fails."""
    stat = library.stat()
    fact = f"{library}:{stat.st_size}:{stat.st_mtime_ns}:{_PROOF}"
    notes = cache_folder() / "libraries.json"
    try:
        proven = list(json.loads(notes.read_text()))
    except (OSError, ValueError, TypeError):
        proven = []
    if fact in proven:
        _log.info("%s: has passed the self-test before", library)
        return
    command = [sys.executable, "-m", "flashmoe.tools.self_test", str(library)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
        lines = child.stderr.strip().splitlines() or [f"ended by signal {-child.returncode}"]
        failure = lines[-1] if child.returncode else None
    except subprocess.TimeoutExpired:
        failure = "no answer"
    if failure:
        known = ", ".join(sorted({build.name for build in abi.KNOWN_BUILDS.values()}))
        raise LibraryError(
            f"{library}: this llama.cpp library does not work with the slot pool ({failure}); builds that do: {known}"
        )
    _log.info("%s: has passed the self-test", library)
    with suppress(OSError):  # a home that cannot be written: proven again next time
        write_atomically(notes, json.dumps([*proven, fact], indent=1).encode())


def tested_library() -> Library:
    """The llama.cpp library, after it has shown once that the pool works with it. Raises LibraryError."""
    path = find_library()
    prove(path)
    return open_library(path)
