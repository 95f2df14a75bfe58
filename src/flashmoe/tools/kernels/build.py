"""Builds kernels for this processor, or takes them from files; those that work are timed, and the fastest is kept.

All that is made lies in a folder that is removed at the end, whatever that is; what is kept is renamed out of it.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flashmoe.engines.llamacpp import kernels
from flashmoe.engines.llamacpp.kernels import Kernels
from flashmoe.engines.llamacpp.library import find_library, is_of_wheel, kernels_name
from flashmoe.engines.llamacpp.tested import forget, prove, self_test
from flashmoe.errors import FlashMoEError, LibraryError, UsageError
from flashmoe.tools.kernels.compile import Tree
from flashmoe.tools.kernels.source import DAMAGED, fetch, read_to_end, unpack
from flashmoe.tools.kernels.toolchain import find_toolchain
from flashmoe.tools.kernels.trial import Trial, score, timed

#: Called with what is done, how much of it, and of how much: "fetch", "compile zen4", "try zen4", "time".
Progress = Callable[[str, int, int], None]

_MOST_TRIED = 4  # variants: the first that works whole is the last
_FASTER = 1.03  # times the built-in kernels: less is not worth a module
_NAME = re.compile(rf"(?!{kernels.BUILT_IN}$)\w[\w.+-]*", re.ASCII)
_MODULES = "libggml-cpu-*.so*"


@dataclass(frozen=True)
class Result:
    """The modules tried, and the outcome. in_use: the fastest, None where the built-in kernels are; new: made now."""

    compiler: str
    tried: list[Trial]
    in_use: Kernels | None
    new: bool

    def sentence(self) -> str:
        """The result in a line."""
        failed = [f"{x.name} does not work here ({x.proof.failure})" for x in self.tried if not x.proof.plain]
        partly = [
            f"{x.name} fails with repacked weights ({x.proof.failure})"
            for x in self.tried
            if x.proof.plain and not x.proof.repacked
        ]
        notes = "".join(f"; {note}" for note in failed + partly)
        if self.in_use and self.new:
            speed = self.in_use.facts
            return (
                f"{self.in_use.name} in use from now on: {speed['decode_ratio']:.2f}x in decoding, "
                f"{speed['prompt_ratio']:.2f}x in prompts{notes}"
            )
        name = self.in_use.name if self.in_use else "built-in"
        speeds = [f"{x.name} {x.ratio:.2f}x" for x in self.tried if x.proof.plain]
        return f"the {name} kernels stay in use: {', '.join(speeds) or 'none of the others works'}{notes}"


def build(archive: Path | None, progress: Progress) -> Result:
    """Compile kernels for this processor from the wheel's source archive (default: the one on the package index).

    Raises FlashMoEError, which says what to do, and UsageError where another library than the wheel's is in use.
    """
    library, tools = _wheel(), find_toolchain()
    with _workshop() as shop:
        version = kernels.wheel_version()
        ggml = unpack(archive or fetch(version, shop, progress), version, shop)
        progress("configure", 0, 1)
        tree = Tree(ggml, shop / "build", tools)

        def made() -> Iterator[Path]:
            for variant in tree.variants():
                folder = shop / variant
                yield folder / tree.make(variant, folder, lambda *n: progress(f"compile {n[0]}", *n[1:]))

        source = archive.name if archive else f"xllamacpp-{version}.tar.gz"
        return _keep_fastest(library, made(), source, tools.compiler, progress)


def add(file: Path, progress: Progress) -> Result:
    """Take kernels from a module's file, or from an archive of several (an npm package's).

    Raises FlashMoEError, and UsageError where there is no such file or another library than the wheel's is in use.
    """
    library = _wheel()
    if not file.is_file():
        raise UsageError(f"{file}: no such file")
    with _workshop() as shop:
        modules = _unpacked(file, shop) if tarfile.is_tarfile(file) else _copied(file, shop)
        scores = {module: score(module) for module in modules if _NAME.fullmatch(kernels_name(module))}
        fitting = sorted((module for module in scores if scores[module]), key=lambda module: -scores[module])
        if not fitting:
            raise LibraryError(
                f"{file}: has no kernels that this processor can run, or not all that they need; "
                "a module's file is called libggml-cpu-NAME.so"
            )
        result = _keep_fastest(library, iter(fitting), file.name, "", progress)
    if not any(trial.proof.plain for trial in result.tried):
        raise LibraryError(f"{file}: {result.tried[0].name} does not work ({result.tried[0].proof.failure})")
    return result


def check(progress: Progress) -> list[Trial]:
    """Test and time all that is kept again. A module that fails is not used from the next start on."""
    library, trials = _wheel(), []
    for one in kernels.kept():
        progress(f"try {one.name}", 0, 1)
        forget(library, one.module)
        try:
            proof = self_test(library, one.module)
        except LibraryError:
            proof = prove(library, one.module)
        trials.append(Trial(one.name, one.module, proof))
    progress("time", 0, 1)
    return timed(library, trials)


def _wheel() -> Path:
    """The library, which must be the wheel's: others have kernels of their own. Raises UsageError, LibraryError."""
    library = find_library()
    if not is_of_wheel(library):
        raise UsageError(
            f"{library}: only xllamacpp's library takes kernels from elsewhere; compile this one anew"
        )
    return library


def _keep_fastest(
    library: Path, modules: Iterable[Path], source: str, compiler: str, progress: Progress
) -> Result:
    """Try modules, the most promising first, until one works whole. The fastest of those that work is kept and used,
    if it is faster than the built-in kernels and than those in use, which run in turns with it."""
    trials: list[Trial] = []
    for module in modules:
        name = kernels_name(module)
        progress(f"try {name}", 0, 1)
        trials.append(Trial(name, module, prove(library, module)))
        if trials[-1].proof.repacked or len(trials) == _MOST_TRIED:
            break
    tried, before = len(trials), kernels.in_use()
    if before:
        trials.append(Trial(before.name, before.module, prove(library, before.module)))
    progress("time", 0, 1)
    trials = timed(library, trials)
    working = [x for x in trials if x.proof.plain and x.ratio >= _FASTER]
    best = max(working, key=lambda x: x.ratio, default=None)
    if best is None:
        if compiler or any(x.proof.plain for x in trials):
            # files from elsewhere that do not work decide nothing
            kernels.use(kernels.BUILT_IN)
        return Result(compiler, trials[:tried], None, new=False)
    if before and best.module == before.module:
        return Result(compiler, trials[:tried], before, new=False)
    facts = {
        "name": best.name,
        "source": source,
        "compiler": compiler,
        "repacks": best.proof.repacked,
        "decode_ratio": best.decode_ratio,
        "prompt_ratio": best.prompt_ratio,
    }
    kept = kernels.keep(best.module.parent, best.module.name, facts)
    kernels.use(kept.name)
    self_test(library, kept.module)  # notes that it has passed, so that the first start does not wait for it
    return Result(compiler, trials[:tried], kept, new=True)


@contextmanager
def _workshop() -> Iterator[Path]:
    """A folder for what is being made, one at a time; gone at the end. Raises FlashMoEError."""
    place = kernels.folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with open(place / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FlashMoEError("kernels are being built by another process: wait for it") from None
            for left in place.glob(".part-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=".part-", dir=place, ignore_cleanup_errors=True) as shop:
                yield Path(shop)
    except OSError as error:
        raise FlashMoEError(
            f"{place}: cannot be written ({error.strerror or error}); make room, or mend its rights"
        ) from None


def _copied(file: Path, shop: Path) -> list[Path]:
    """A module's file, and the base library where it lies beside it."""
    folder = shop / "added"
    folder.mkdir()
    for path in (file, *file.parent.glob("libggml-base.so*")):
        shutil.copy(path, folder)
    return [folder / file.name]


def _unpacked(archive: Path, shop: Path) -> list[Path]:
    """The modules of an archive, each in a folder with the base library that lay beside it."""
    everything = shop / "archive"
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name)
                if member.isfile() and name.name.startswith("libggml-") and ".so" in name.name:
                    place = everything / name.parent.name
                    place.mkdir(parents=True, exist_ok=True)
                    content = tar.extractfile(member)
                    assert content
                    with open(place / name.name, "wb") as out:
                        shutil.copyfileobj(content, out)
            read_to_end(tar)
    except DAMAGED as error:
        raise FlashMoEError(f"{archive}: cannot be unpacked ({error}); fetch it again") from None
    modules = []
    for number, path in enumerate(sorted(everything.rglob(_MODULES))):
        folder = shop / f"added-{number}"
        folder.mkdir()
        for file in (path, *path.parent.glob("libggml-base.so*")):
            shutil.copy(file, folder)
        modules.append(folder / path.name)
    return modules
