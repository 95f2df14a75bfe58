"""Compiles ggml's CPU backend for one kind of processor after another, as modules that the wheel can load."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from flashmoe.common.machine import cores
from flashmoe.errors import FlashMoEError
from flashmoe.tools.kernels.toolchain import Toolchain
from flashmoe.tools.kernels.trial import score

_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_BACKEND_DL": "ON",
    "GGML_NATIVE": "OFF",
    "GGML_LLAMAFILE": "ON",  # as the wheel's own kernels have it
    "GGML_CPU_ALL_VARIANTS": "ON",
    "GGML_BUILD_TESTS": "OFF",
    "GGML_BUILD_EXAMPLES": "OFF",
    "GGML_CCACHE": "OFF",
    # the module finds the base library beside it, wherever both are moved to
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
}
_LINES = 3  # of an error
_PATIENCE = 50  # tenths of a second for tools that are to end

#: Called with a variant's name, the steps done and their number.
Progress = Callable[[str, int, int], None]


class Tree:
    """A tree of ggml's sources, configured in `folder`. Raises FlashMoEError where the tools fail."""

    def __init__(self, ggml: Path, folder: Path, tools: Toolchain) -> None:
        self._tools, self._folder = tools, folder
        self._environment = {
            **os.environ,
            "ZIG_GLOBAL_CACHE_DIR": str(folder / "zig"),  # nothing is left behind
            "ZIG_LOCAL_CACHE_DIR": str(folder / "zig"),
        }
        options = {
            **_OPTIONS,
            "CMAKE_C_COMPILER": ";".join(tools.c),
            "CMAKE_CXX_COMPILER": ";".join(tools.cxx),
            "CMAKE_MAKE_PROGRAM": tools.make,
        }
        self._run(
            [tools.cmake, "-S", str(ggml), "-B", str(folder), "-G", tools.generator]
            + [f"-D{name}={value}" for name, value in options.items()],
            "configuring",
            lambda line: None,
        )

    def variants(self) -> list[str]:
        """The variants that this processor can run, by ggml's own score, the best first."""
        listed = (self._folder / "CMakeFiles" / "TargetDirectories.txt").read_text()
        names = sorted(set(re.findall(r"/ggml-cpu-([\w.]+)-feats\.dir", listed)))
        if not names:
            raise FlashMoEError("this llama.cpp has no variants of its kernels for this kind of processor")
        self._build(
            [f"ggml-cpu-{name}-feats" for name in names], "looking at this processor", lambda *_: None
        )
        scores = {name: self._score(name) for name in names}
        return sorted((name for name, score in scores.items() if score > 0), key=lambda name: -scores[name])

    def make(self, variant: str, target: Path, progress: Progress) -> str:
        """Compile a variant into the folder `target`, which is made; the name of its file there."""
        self._build([f"ggml-cpu-{variant}"], variant, lambda done, total: progress(variant, done, total))
        module = self._file(f"libggml-cpu-{variant}.so")
        target.mkdir()
        for file in (module, self._base()):
            shutil.copy(file, target)
        return module.name

    def _base(self) -> Path:
        """The base library, by the name that modules look for: with the first number of its version."""
        names = sorted(self._folder.rglob("libggml-base.so.*"), key=lambda path: len(path.name))
        return names[0] if names else self._file("libggml-base.so")

    def _file(self, name: str) -> Path:
        found = next(iter(self._folder.rglob(name)), None)
        if found is None:
            raise FlashMoEError(
                f"the compiler has made no {name}; please report this with your system's name"
            )
        return found

    def _score(self, variant: str) -> int:
        """What ggml thinks of a variant on this processor; 0 for one that does not run here."""
        objects = list(self._folder.rglob(f"ggml-cpu-{variant}-feats.dir/**/*.o"))
        library = self._folder / f"feats-{variant}.so"
        link = [*self._tools.cxx, "-shared", "-o", str(library), *map(str, objects)]
        self._run(link, "linking", lambda line: None)
        return score(library)

    def _build(self, targets: Sequence[str], what: str, progress: Callable[[int, int], None]) -> None:
        def look(line: str) -> None:
            if match := re.match(r"\[(\d+)/(\d+)\]", line):
                progress(int(match[1]), int(match[2]))
            elif match := re.match(r"\[ *(\d+)%\]", line):
                progress(int(match[1]), 100)

        command = [
            self._tools.cmake,
            "--build",
            str(self._folder),
            "--parallel",
            str(cores()),
            "--target",
            *targets,
        ]
        self._run(command, what, look)

    def _run(self, command: Sequence[str], what: str, look: Callable[[str], None]) -> None:
        """Run a command, whose children end with it whatever happens here."""
        said: list[str] = []  # from the first error on
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self._environment,
            start_new_session=True,
        ) as child:
            try:
                assert child.stdout
                for line in child.stdout:
                    look(line.rstrip())
                    if line.strip() and (said or re.search(r"\berror\b", line, re.I)):
                        said += [line.strip()][: _LINES - len(said)]
                status = child.wait()
            except BaseException:
                _end(child)
                raise
        if status:
            raise FlashMoEError(f"{what} with {self._tools.compiler} has failed ({' '.join(said)})")


def _end(child: subprocess.Popen[str]) -> None:
    """End a tool and the compilers that it has started; ninja's are in groups of their own, and it ends them itself."""
    with suppress(ProcessLookupError):  # raised when all of them are gone
        os.killpg(child.pid, signal.SIGTERM)
        for _ in range(_PATIENCE):
            time.sleep(0.1)
            child.poll()
            os.killpg(child.pid, 0)
        os.killpg(child.pid, signal.SIGKILL)
