"""FlashMoE: run Mixture-of-Experts models larger than RAM, their experts streamed from the SSD, bit for bit exact."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from flashmoe.errors import FlashMoEError

if TYPE_CHECKING:
    from flashmoe.engines.base import SamplingParams
    from flashmoe.runtime.conversation import Conversation
    from flashmoe.runtime.load import load
    from flashmoe.runtime.model import Model
    from flashmoe.runtime.options import LoadOptions
    from flashmoe.tools.integrity import Verdict, verify

__all__ = [
    "Conversation",
    "FlashMoEError",
    "LoadOptions",
    "Model",
    "SamplingParams",
    "Verdict",
    "load",
    "verify",
]

# silent unless a program that uses this package, or --verbose, wants to see records
logging.getLogger(__name__).addHandler(logging.NullHandler())

__version__: str
_MODULES = {
    "Conversation": "runtime.conversation",
    "LoadOptions": "runtime.options",
    "Model": "runtime.model",
    "SamplingParams": "engines.base",
    "Verdict": "tools.integrity",
    "load": "runtime.load",
    "verify": "tools.integrity",
}


def __getattr__(name: str) -> Any:
    """Import the engine only when it is used: errors and file formats load without numba."""
    if name == "__version__":
        from importlib.metadata import (  # it takes an eighth of the time of `--help`
            PackageNotFoundError,
            version,
        )

        try:
            return version("flashmoe-ssd")
        except PackageNotFoundError:  # run from a source tree that is not installed
            return "0"
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'flashmoe' has no attribute {name!r}")
