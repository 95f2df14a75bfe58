"""Runs the self-test of a library with the slot pool, and of kernels that take the place of its own, once per file.

It is `flashmoe.tools.self_test`, which loads models: it runs in a child process, because a wrong layout crashes, and so
do kernels for another processor.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from flashmoe.common.children import module_command
from flashmoe.common.files import cache_folder, write_atomically
from flashmoe.common.machine import instructions, processor
from flashmoe.engines.llamacpp import abi, kernels
from flashmoe.engines.llamacpp.library import ENVIRONMENT, Library, find_library, is_of_wheel, open_library
from flashmoe.errors import LibraryError, warn
from flashmoe.storage.addresses import check_room

_log = logging.getLogger(__name__)

_TIMEOUT = 600  # seconds: on a small processor what is compiled before it takes minutes
NOT_TESTED = 75  # its exit status where it could not be run; EX_TEMPFAIL of sysexits.h
# of addresses, where they are limited
_ROOM = 144 << 20  # the library, threads, and a model of 20 MiB
_ROOM_TO_TEST = 384 << 20  # twice two models, in a process that has as many
_VERSION = 6  # of the self-test: a library that has passed an earlier one is tested again
_NO_PROCESS = "its process cannot be started"
#: What the self-test prints when a layout has passed, in this order.
PLAIN, REPACKED = "plain", "repacked"


class Proof(NamedTuple):
    """Whether weights in the file's layouts work, and repacked ones; and why not, where one does not."""

    plain: bool
    repacked: bool
    failure: str = ""


def prove(library: Path, module: Path | None = None) -> Proof:
    """Run the self-test of a library, or of the kernels of a module in it, now. Raises LibraryError where it cannot,
    and BudgetError where addresses are limited to too few."""
    check_room(_ROOM_TO_TEST, f"{library}: the self-test, which it must pass once,")
    command = module_command("flashmoe.tools.self_test", *map(str, filter(None, (library, module))))
    quick = {**os.environ, "GGML_NO_BACKTRACE": "1"}  # a debugger would be started where the library aborts
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, env=quick
        )
        failure = ended_by(child.returncode, child.stderr) if child.returncode else ""
        passed = child.stdout.split()
        if child.returncode == NOT_TESTED:
            raise LibraryError(
                f"{library}: must be tested once, and there is no room for that ({failure}): make 8 MiB free in a "
                "temporary folder, or name another in TMPDIR"
            )
    except subprocess.TimeoutExpired as error:
        failure = "no answer"
        passed = (error.stdout or b"").decode().split()
    except OSError as error:  # no more processes, or no memory for one
        return Proof(False, False, f"{_NO_PROCESS}: {error.strerror}")
    if not failure and passed[-2:] == [PLAIN, REPACKED]:
        return Proof(True, True)
    # what has passed all and crashes at the end is not fit either, nor what ends the process by itself before
    return Proof(passed[-1:] == [PLAIN], False, failure or "ended before its time")


def ended_by(status: int, stderr: str) -> str:
    """Why a child has failed: its signal, or its own last words, which it has too where it has aborted itself."""
    last = (stderr.strip().splitlines() or [""])[-1]
    if status >= 0:
        return last or f"status {status}"
    if -status == signal.SIGABRT and last:
        return last
    try:
        return f"ended by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal
        return f"ended by signal {-status}"


def _for_want_of_memory(failure: str) -> bool:
    """Whether a child has failed for a reason that may pass: the system had no room for it, or has killed it."""
    return failure.startswith(_NO_PROCESS) or failure == ended_by(-signal.SIGKILL, "")


def self_test(library: Path, module: Path | None = None) -> Proof:
    """The same, unless these files have been tested before. Raises LibraryError where not even `plain` works, or where
    they cannot be tested."""
    notes = _Notes(library, module)
    proof = notes.read()
    if proof:
        _log.info("%s: has passed the self-test before", module or library)
    else:
        proof = prove(library, module)
        # a library that fails is tested again at the next start, when it may have been mended; a module is not
        # the library's fault, and would cost every start some seconds
        if proof.plain or (module and not _for_want_of_memory(proof.failure)):
            notes.write(proof)
        if proof.plain and not proof.repacked:
            warn(
                f"{module or library}: fails with repacked weights ({proof.failure}), which are not used with it"
            )
    if proof.plain:
        return proof
    if module:
        raise LibraryError(f"{module}: these kernels do not work here ({proof.failure})")
    if proof.failure == ended_by(-signal.SIGILL, ""):
        raise LibraryError(
            f"{library}: this llama.cpp library uses instructions that the processor ({processor()}) does not "
            f"have; build llama.cpp on this machine and name its libllama.so in {ENVIRONMENT}"
        )
    raise LibraryError(
        f"{library}: this llama.cpp library does not work with the slot pool ({proof.failure}); "
        f"builds that do: {abi.known_builds()}"
    )


def forget(library: Path, module: Path | None = None) -> None:
    """Have these files tested again."""
    _Notes(library, module).write(None)


def tested_library() -> Library:
    """The llama.cpp library, with the kernels in use, after both have passed the self-test once.

    Kernels that fail, or are refused, give way to the library's own, with a warning. Raises LibraryError.
    """
    path = find_library()
    check_room(_ROOM, "the smallest model")
    if is_of_wheel(path):
        if kernels.new_wheel():
            _tell_of_new_wheel()
        if chosen := kernels.in_use():
            try:
                proof = self_test(path, chosen.module)
                return open_library(path, chosen.module, repacks=proof.repacked)
            except LibraryError as error:
                warn(
                    f"{error}: the built-in ones are used; `flashmoe engine build` makes others, "
                    "`flashmoe engine use built-in` ends this warning"
                )
    library = open_library(path, repacks=self_test(path).repacked)
    if not library.build.known:
        message = (
            f"{path}: {library.build.name} is not a build that FlashMoE knows, but has passed the self-test"
        )
        warn(message)
    return library


def _tell_of_new_wheel() -> None:
    warn(
        f"xllamacpp {kernels.wheel_version()} is new here, and the kernels that were built are for another version: "
        "`flashmoe engine build` builds them again",
        3,
    )
    with suppress(OSError):  # a home that cannot be written: said again next time
        kernels.use(kernels.BUILT_IN, chosen=False)


class _Notes:
    """What is known of the files of a library, and of a module in it, from earlier self-tests."""

    def __init__(self, library: Path, module: Path | None) -> None:
        files = [path for path in (library, module) if path]
        stats = [(path, path.stat()) for path in files]
        # another processor may lack instructions: homes and virtual machines move between machines
        facts = [f"{path}:{stat.st_size}:{stat.st_mtime_ns}" for path, stat in stats]
        self._fact = ":".join([*facts, str(_VERSION), instructions()])
        self._path = cache_folder() / "libraries.json"

    def _all(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._path.read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def read(self) -> Proof | None:
        try:
            layouts, failure = self._all()[self._fact]
            return Proof(PLAIN in layouts, REPACKED in layouts, str(failure))
        except (KeyError, ValueError, TypeError):
            return None

    def write(self, proof: Proof | None) -> None:
        noted = self._all()
        noted.pop(self._fact, None)
        if proof:
            passed = [name for name, works in ((PLAIN, proof.plain), (REPACKED, proof.repacked)) if works]
            noted[self._fact] = [passed, proof.failure]
        with suppress(OSError):  # a home that cannot be written: tested again next time
            write_atomically(self._path, json.dumps(noted, indent=1).encode())
