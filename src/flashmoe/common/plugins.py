"""Classes by name, those built in and those of other packages: what a spec NAME or NAME:FILE makes."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from flashmoe.common.files import expanded
from flashmoe.errors import FlashMoEError

#: What a user gets who names nothing, where several may be named.
DEFAULT = "default"

T = TypeVar("T")


@dataclass(frozen=True)
class Listed:
    """A name, as `flashmoe policies` and `flashmoe predictors` show it."""

    name: str
    file: str  # "needed", "possible", or "" where NAME:FILE is not known
    about: str  # the first sentence of its documentation
    package: str  # that it comes from


@dataclass(frozen=True)
class Registry(Generic[T]):
    """All classes of a kind. Another package adds one with an entry point in `group`: its name is the name in specs,
    its value a callable that returns a `kind` (for NAME:FILE, it is called with the path as keyword `file`)."""

    kind: type[T]
    noun: str  # what messages call it
    error: type[FlashMoEError]
    package: str
    builtin: Mapping[str, str]  # name -> module:class in the package, imported when asked for
    group: str
    also: tuple[str, ...] = ()  # names that the caller handles, listed first

    def available(self) -> list[str]:
        """All names: built in first, then those of other packages."""
        own = [*self.also, *self.builtin]
        return own + sorted({point.name for point in entry_points(group=self.group)} - set(own))

    def names(self, wanted: Callable[[Any], bool]) -> list[str]:
        """Names of those that are `wanted`, asked with what makes them: the class, or another callable."""
        own = (name for name in self.available() if name not in self.also)
        return [name for name in own if wanted(self.find(name))]

    def listed(self) -> list[Listed]:
        """All of them but those of `also`, in the order of `available`; what cannot be imported says so."""
        packages = {point.name: _package(point) for point in entry_points(group=self.group)}
        own = self.package.partition(".")[0]
        rows = []
        for name in self.available():
            if name in self.also:
                continue
            package = own if name in self.builtin else packages[name]
            try:
                factory = self.find(name)
            except Exception as error:  # of another package: anything
                rows.append(Listed(name, "", f"cannot be imported: {error!r}", package))
                continue
            rows.append(Listed(name, _takes_file(factory), _first_sentence(factory), package))
        return rows

    def parse(self, spec: str) -> tuple[str, dict[str, Any]]:
        """The name in a spec, and the options it stands for. Raises `error` where its file is missing."""
        name, _, file = spec.partition(":")
        if not file:
            return name.strip(), {}
        path = expanded(file)
        if not os.path.isfile(path):
            raise self.error(
                f"{self.noun} file {file} does not exist: give NAME:FILE with the path of a .safetensors file"
            )
        return name.strip(), {"file": path}

    def create(self, spec: str, **options: Any) -> T:
        """Make what a spec says. Raises `error` for an unknown name, a missing file, or options it does not have."""
        name, given = self.parse(spec)
        options |= given
        factory = self.find(name)
        try:
            inspect.signature(factory).bind(**options)
        except TypeError as error:
            raise self.error(f"{self.noun} {name!r} cannot be made from {spec!r}: {error}") from None
        except ValueError:  # a callable without a signature
            pass
        made = factory(**options)
        if not isinstance(made, self.kind):
            article = "an" if self.kind.__name__[0] in "AEIOU" else "a"
            raise self.error(
                f"entry point {name!r} returned {type(made).__name__}, which is not {article} {self.kind.__name__}"
            )
        return made

    def find(self, name: str) -> Any:
        """What makes those of a name. Raises `error` for an unknown name."""
        if name in self.builtin:
            module, _, attribute = self.builtin[name].partition(":")
            return getattr(importlib.import_module(f"{self.package}.{module}"), attribute)
        for point in entry_points(group=self.group):
            if point.name == name:
                return point.load()
        raise self.error(f"unknown {self.noun} {name!r}: use one of {', '.join(self.available())}")


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.module.partition(".")[0]


def _takes_file(factory: Any) -> str:
    if getattr(factory, "needs_file", False):
        return "needed"
    try:
        return "possible" if "file" in inspect.signature(factory).parameters else ""
    except (TypeError, ValueError):  # no callable, or one without a signature
        return ""


def _first_sentence(factory: Any) -> str:
    """Of its own documentation: a class without any has that of its base, which says nothing of it."""
    text = " ".join(inspect.cleandoc(factory.__doc__ or "").partition("\n\n")[0].split())
    return re.split(r"(?<=\.) (?!\.)", text, maxsplit=1)[0].rstrip(".")
