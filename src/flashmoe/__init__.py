"""FlashMoE: run Mixture-of-Experts models larger than RAM, their experts streamed from the SSD, bit for bit exact."""

from __future__ import annotations

import logging
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
    if name == "load":
        from flashmoe.runtime.load import load

        return load
    if name == "LoadOptions":
        from flashmoe.runtime.options import LoadOptions

        return LoadOptions
    if name == "Model":
        from flashmoe.runtime.model import Model

        return Model
    if name == "Conversation":
        from flashmoe.runtime.conversation import Conversation

        return Conversation
    if name == "SamplingParams":
        from flashmoe.engines.base import SamplingParams

        return SamplingParams
    if name in ("Verdict", "verify"):
        from flashmoe.tools import integrity

        return getattr(integrity, name)
    raise AttributeError(f"module 'flashmoe' has no attribute {name!r}")
