"""Opens transformers, which is an optional extra, and keeps its output out of the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from flashmoe.errors import LibraryError

_INSTALL = "pip install 'flashmoe-ssd[transformers]'"
_LEAST = 5  # the major version that dispatches experts through an interface


def open_transformers() -> Any:
    """The library. Raises LibraryError where it, or torch, is not installed or too old."""
    try:
        import_module("torch")
        library = import_module("transformers")
    except ImportError as error:
        raise LibraryError(
            f"--engine transformers needs a package that is not installed ({error.name}): {_INSTALL}"
        ) from None
    if int(library.__version__.split(".")[0]) < _LEAST:
        raise LibraryError(
            f"transformers {library.__version__} is too old, version {_LEAST} or later is needed: {_INSTALL}"
        )
    return library


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no progress bars of the library inside."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
