"""Modules of compute kernels that are kept for this processor, and which of them is in use.

ggml calls them CPU backend modules. A module fits one version of the wheel, and was tried on one processor: each pair
of these has a folder of its own in the user's cache folder, in it a folder for each module (its file, what it needs
beside it, and `kernels.json`, what is known of it), and `in-use.json`. Files and folders are renamed into place when
they are whole. What is damaged counts as not there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from flashmoe.common.files import cache_folder, write_atomically
from flashmoe.common.machine import instructions, processor
from flashmoe.engines.llamacpp.instructions import better_here, compiled_for
from flashmoe.engines.llamacpp.library import BUILT_IN, Library, is_of_wheel
from flashmoe.errors import UsageError

_FACTS, _IN_USE = "kernels.json", "in-use.json"
_WORTH = {("AVX2", "AVX-512"): "up to 1.5x"}  # measured: docs/engines.md


@dataclass(frozen=True)
class Kernels:
    """A module that is kept.

    name: "zen4". module: its file. facts: JSON: `source`, `compiler`, `instructions`, `repacks` (whether repacked
    layouts work with it), `decode_ratio` and `prompt_ratio` (of speeds, to the built-in kernels).
    """

    name: str
    module: Path
    facts: dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """What is in use. chosen: by the user or by a measurement; else there is only nothing better yet."""

    name: str = BUILT_IN
    chosen: bool = False


@cache
def wheel_version() -> str:
    """Of the installed wheel; "" where it is not installed."""
    try:
        return importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        return ""


def folder() -> Path:
    """Of this wheel and this processor; it may not be there."""
    digest = hashlib.sha256(f"{processor()} {instructions()}".encode()).hexdigest()[:12]
    return cache_folder() / "kernels" / f"xllamacpp-{wheel_version()}-{digest}"


def kept() -> list[Kernels]:
    """All modules that are kept for this wheel and processor."""
    found = []
    for path in sorted(folder().glob(f"[!.]*/{_FACTS}")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            facts = dict(json.loads(path.read_text()))
            for name in ("decode_ratio", "prompt_ratio"):
                facts[name] = float(facts[name])
            facts["source"] = str(facts["source"])
            kernels = Kernels(str(facts["name"]), path.parent / Path(facts["module"]).name, facts)
            if kernels.module.is_file():
                found.append(kernels)
    return found


def find(name: str) -> Kernels:
    """A module that is kept. Raises UsageError."""
    there = {kernels.name: kernels for kernels in kept()}
    if name not in there:
        known = ", ".join([BUILT_IN, *there])
        raise UsageError(f"no kernels called {name!r} for this wheel and processor; there are {known}")
    return there[name]


def keep(made: Path, module: str, facts: dict[str, Any]) -> Kernels:
    """Take a folder of files into the collection, in the place of kernels of the same name.

    made: a folder in `folder()`, which is renamed; module: the file in it that has the kernels. Raises OSError.
    """
    write_atomically(made / _FACTS, json.dumps({**facts, "module": module}, indent=1).encode())
    before = [old for old in kept() if old.name == facts["name"]]
    digest = hashlib.sha256((made / module).read_bytes()).hexdigest()[:12]
    place = folder() / f"{facts['name']}-{digest}"
    if place.exists():
        shutil.rmtree(place)
    os.rename(made, place)
    for old in before:
        if old.module.parent != place:
            shutil.rmtree(old.module.parent)
    return Kernels(facts["name"], place / module, facts)


def remove(kernels: Kernels) -> None:
    """Forget a module; where it is in use, the built-in kernels are from then on. Raises OSError."""
    if choice().name == kernels.name:
        use(BUILT_IN, chosen=False)
    shutil.rmtree(kernels.module.parent)


def choice() -> Choice:
    """What was decided for this wheel and processor."""
    try:
        noted = json.loads((folder() / _IN_USE).read_text())
        return Choice(str(noted["name"]), bool(noted["chosen"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Choice()


def use(name: str, *, chosen: bool = True) -> None:
    """Use kernels that are kept, or the built-in ones, from the next start on. Raises OSError."""
    write_atomically(folder() / _IN_USE, json.dumps({"name": name, "chosen": chosen}).encode())


def in_use() -> Kernels | None:
    """The module to start with; None for the built-in kernels."""
    name = choice().name
    return next((kernels for kernels in kept() if kernels.name == name), None)


def new_wheel() -> bool:
    """Whether an earlier wheel had kernels of its own on this processor, and nothing was said of it yet."""
    place = folder()
    earlier = place.parent.glob(f"xllamacpp-*-{place.name.rpartition('-')[2]}/*/{_FACTS}")
    return not (place / _IN_USE).exists() and any(path.parent.parent != place for path in earlier)


def hint(lib: Library) -> str:
    """What faster kernels would be worth, in a sentence; "" where the library's are the best, or were chosen."""
    if lib.module or not is_of_wheel(lib.path) or choice().chosen:
        return ""
    better = better_here(lib.features)
    if not better:
        return ""
    own = compiled_for(lib.features) or "no special instructions"
    worth = _WORTH.get((own, better), "a good deal")
    return (
        f"the engine in use has {own}, this processor {better}: "
        f"`flashmoe engine build` (a minute or two) is worth {worth}"
    )
