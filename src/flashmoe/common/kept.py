"""Compiled code that is kept on disk, and compiled again when anything that it was made of has changed.

numba keeps a compiled function until the file that defines it changes. But it contains all that it calls, wherever that
was written, and the values of all constants: after a change there, numba would go on with the old code. `kept` and
`kept_callback` are numba's `njit` and `cfunc`, kept until something that the function reaches changes, and no longer:
a change in one policy leaves the others' code as it is.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numba
import numpy as np

from flashmoe.common.files import cache_folder
from flashmoe.common.numba_internals import (
    KEEPS,
    BesideSource,
    CFunc,
    ForUser,
    FunctionCache,
    NullCache,
    Signature,
    memory_runtime,
    normalize_signature,
)
from flashmoe.common.optimised import optimising_once
from flashmoe.errors import LibraryError

_log = logging.getLogger(__name__)

Also = Callable[[], Iterable[Any]]
#: What changes with their own version, which numba compares where it matters.
_FOREIGN = {"numba", "numpy", "llvmlite", *sys.stdlib_module_names}


def kept(*, also: Also = tuple, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit(**options)`, kept on disk. also: what a function reaches that its code does not name (functions,
    classes, constants; of a module, its file), asked for when the code is first needed."""

    def keep(function: Callable[..., Any]) -> Any:
        made: Any = numba.njit(**options)(function)
        if hasattr(made, "compile"):  # not so where compilation is switched off
            made.compile = optimising_once(made.compile, function.__qualname__)
        if KEEPS and hasattr(made, "_cache"):
            made._cache = _cache(function, also)
        return made

    return keep


def kept_callback(signature: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.cfunc(signature, **options)`, kept on disk. Raises LibraryError where compilation is switched off: the
    library cannot call Python in the place of it."""
    if getattr(numba.config, "DISABLE_JIT", False):
        raise LibraryError("NUMBA_DISABLE_JIT is set, and what llama.cpp calls must be compiled: unset it")
    if not KEEPS:
        return numba.cfunc(signature, **options)

    def keep(function: Callable[..., Any]) -> Any:
        made: Any = CFunc(function, normalize_signature(signature), locals={}, options=options)
        made._cache = _cache(function, tuple)
        made.compile()
        return made

    return keep


class _InCacheFolder(BesideSource):
    """Where compiled code is kept if it cannot be kept beside its source: in our own cache folder. numba's folder for
    the user may be one that cannot be written either, or "~" itself."""

    def __init__(self, function: Any, file: str) -> None:
        super().__init__(function, file)
        self._cache_path = str(cache_folder() / "compiled" / self.get_suitable_cache_subpath(file))


class _Place(FunctionCache._impl_class):  # type: ignore[misc, valid-type]
    """Which file compiled code is kept in."""

    _locator_classes = tuple(
        _InCacheFolder if locator is ForUser else locator
        for locator in FunctionCache._impl_class._locator_classes
    )


def _cache(function: Callable[..., Any], also: Also) -> Any:
    """A function's cache; none where nothing can be written: it is compiled by every process."""
    try:
        return _Cache(function, also)
    except (RuntimeError, OSError) as error:
        _log.warning("compiled code is not kept: %s", error)
        return NullCache()


class _Cache(FunctionCache):
    """numba's cache of a function, with a stamp of all that the function reaches. What cannot be read is made anew,
    what cannot be written is not kept."""

    _impl_class = _Place

    def __init__(self, function: Callable[..., Any], also: Also) -> None:
        super().__init__(function)
        self._also: Also | None = also

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        self._stamp()
        try:
            # numba's own loads all that it can compile first, a fifth of a second: compiling does that by itself
            memory_runtime.initialize(target_context)
            return self._load_overload(sig, target_context)
        except Exception as error:  # unpickling half a file raises nearly anything
            _log.warning("%s: cannot be read (%r): compiling again", self._cache_file._index_path, error)
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except (OSError, EOFError, ValueError) as error:  # a full drive; an index that could not be made anew
            _log.warning("%s: compiled code is not kept (%s)", self._cache_file._index_path, error)

    def _stamp(self) -> None:
        """Only now: functions may be named before they are defined."""
        if self._also is not None:
            file = self._cache_file
            file._source_stamp = (file._source_stamp, digest(self._py_func, *self._also()))
            self._also = None

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        """With the fields of named tuples: of these, numba compares the name and the types only."""
        return (
            *super()._index_key(sig, codegen),
            tuple(fields(sig.args if isinstance(sig, Signature) else sig)),
        )


def fields(kind: Any) -> Iterator[Any]:
    """The names of the fields of all named tuples in a type, or in a tuple of types."""
    if isinstance(kind, numba.types.NamedTuple | numba.types.NamedUniTuple):
        yield kind.instance_class._fields
    if isinstance(kind, tuple | numba.types.BaseTuple):
        parts: Any = kind
        for part in parts:
            yield from fields(part)


def digest(*roots: Any) -> str:
    """Of all that functions, classes and constants consist of; of functions, with all that they reach by name."""
    found: dict[Any, bytes] = {}
    parts, todo = [], list(roots)
    while todo:
        text, functions = _describe(todo.pop(0))
        parts.append(text)
        for function in functions:
            if function not in found:
                found[function], further = _content(function)
                todo += further
    everything = sorted(found.values())
    return hashlib.sha256(repr((sorted(parts), everything)).encode()).hexdigest()


@cache
def _content(function: FunctionType) -> tuple[bytes, tuple[Any, ...]]:
    """A function's own code, defaults and constants by name, and the functions that it reaches."""
    texts, functions = [], []
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    for value in (function.__defaults__, function.__kwdefaults__, *cells, *_named(function)):
        text, reached = _describe(value)
        texts.append(text)
        functions += reached
    own = repr((function.__module__, function.__qualname__, _code(function.__code__), texts))
    return own.encode(), tuple(functions)


def _named(function: FunctionType) -> Iterator[Any]:
    """The values of the globals that a function names, and of the attributes of modules."""
    names = _names(function.__code__)
    for name in names:
        if name not in function.__globals__:
            continue
        value = function.__globals__[name]
        yield name
        yield value
        if isinstance(value, ModuleType) and not _foreign(value.__name__):
            for attribute in names:
                if attribute in vars(value):
                    yield attribute
                    yield vars(value)[attribute]


def _names(code: CodeType) -> list[str]:
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _names(const)]
    return sorted({*code.co_names, *inner})


def _code(code: CodeType) -> tuple[Any, ...]:
    """What a code object does, without where it was written."""
    consts = [_code(c) if isinstance(c, CodeType) else _describe(c)[0] for c in code.co_consts]
    return code.co_code, consts, code.co_names, code.co_varnames, code.co_argcount, code.co_flags


def _describe(value: Any) -> tuple[str, list[FunctionType]]:
    """A value as text that is the same in every process, and the functions in it."""
    function = getattr(value, "py_func", None) or getattr(value, "__wrapped__", None) or value
    if isinstance(function, FunctionType):
        foreign = _foreign(function.__module__)
        options = sorted(getattr(value, "targetoptions", {}).items())
        return f"{function.__module__}.{function.__qualname__}{options}", [] if foreign else [function]
    if isinstance(value, tuple | list | frozenset):
        parts = [_describe(part) for part in value]
        texts = [text for text, _ in parts]
        return repr(sorted(texts) if isinstance(value, frozenset) else texts), [
            f for _, more in parts for f in more
        ]
    if isinstance(value, type):
        fields = getattr(value, "_fields", getattr(value, "_fields_", ()))
        return f"{value.__module__}.{value.__qualname__}{fields}", []
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{value.tobytes()!r}", []
    if isinstance(
        value, bool | int | float | complex | str | bytes | np.generic | np.dtype | numba.types.Type | None
    ):
        return repr(value), []
    return type(value).__qualname__, []  # compiled code cannot use it, or it is numba's own


def _foreign(module: str | None) -> bool:
    return module is None or module.partition(".")[0] in _FOREIGN


def source(module: ModuleType) -> bytes:
    """The text of a module, for `also`; nothing where it is not a file of its own, and so does not change."""
    try:
        return Path(module.__file__ or "").read_bytes()
    except OSError:
        return b""
