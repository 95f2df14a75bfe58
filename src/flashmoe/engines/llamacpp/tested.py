"""Runs the self-test of a library with the slot pool, once per library file.

It is `flashmoe.tools.self_test`, which loads a model: it runs in a child process, because a wrong layout crashes.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path

from flashmoe.common.files import cache_folder, write_atomically
from flashmoe.engines.llamacpp import abi
from flashmoe.engines.llamacpp.library import Library, find_library, open_library
from flashmoe.errors import FlashMoEWarning, LibraryError

_log = logging.getLogger(__name__)

_TIMEOUT = 600  # seconds: on a small processor what is compiled before it takes minutes
_VERSION = 4  # of the self-test: a library that has passed an earlier one is tested again


def self_test(library: Path) -> None:
    """Run the self-test of this library file unless it has passed before. Raises LibraryError where it fails."""
    stat = library.stat()
    fact = f"{library}:{stat.st_size}:{stat.st_mtime_ns}:{_VERSION}"
    notes = cache_folder() / "libraries.json"
    try:
        passed = list(json.loads(notes.read_text()))
    except (OSError, ValueError, TypeError):
        passed = []
    if fact in passed:
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
        raise LibraryError(
            f"{library}: this llama.cpp library does not work with the slot pool ({failure}); builds that do: "
            f"{abi.known_builds()}"
        )
    _log.info("%s: has passed the self-test", library)
    with suppress(OSError):  # a home that cannot be written: tested again next time
        write_atomically(notes, json.dumps([*passed, fact], indent=1).encode())


def tested_library() -> Library:
    """The llama.cpp library, after it has passed the self-test once. Raises LibraryError."""
    path = find_library()
    self_test(path)
    library = open_library(path)
    if not library.build.known:
        message = (
            f"{path}: {library.build.name} is not a build that FlashMoE knows, but has passed the self-test"
        )
        warnings.warn(message, FlashMoEWarning, stacklevel=2)
    return library
