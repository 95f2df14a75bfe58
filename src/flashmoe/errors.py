"""Errors a user can cause or mend. Each message is one line that says what is wrong and what to do."""

from __future__ import annotations

import warnings

_MOST = 600  # characters of a message: it may quote a damaged file


class FlashMoEError(Exception):
    """Base of all errors that FlashMoE reports without a traceback; the command line exits with `exit_status`."""

    exit_status = 1

    def __init__(self, message: str) -> None:
        """What is too long for a line loses its middle: the end says what to do."""
        if len(message) > _MOST:
            message = f"{message[: 2 * _MOST // 3]} ... {message[-_MOST // 3 :]}"
        super().__init__(message)


class FlashMoEWarning(UserWarning):
    """Something that a user may want to mend, and that stops nothing."""


def warn(message: str, stacklevel: int = 2) -> None:
    """Warn a user. stacklevel: as `warnings.warn` takes it from the caller."""
    warnings.warn(message, FlashMoEWarning, stacklevel=stacklevel + 1)


class UsageError(FlashMoEError):
    """A wrong argument: an unknown policy, a size that cannot be read, a missing prompt."""

    exit_status = 2


class ClosedError(UsageError):
    """A model is used after it was closed."""

    def __init__(self, message: str = "this model is closed: load it again") -> None:
        super().__init__(message)


class ModelError(FlashMoEError):
    """A model file that is missing, damaged, dense, or of an architecture that cannot be served."""


class LibraryError(FlashMoEError):
    """No usable libllama: none installed, an unknown build, or one that fails the self-check."""


class BudgetError(FlashMoEError):
    """A memory budget below what the model needs; the message names the smallest that works."""


class PolicyError(FlashMoEError):
    """An eviction policy that is unknown, damaged, or made for another model."""

    exit_status = 2


class TraceError(FlashMoEError):
    """A routing trace that is empty, damaged, or does not fit the model."""


class ReadError(FlashMoEError):
    """Expert bytes could not be read from the model file after the allowed retries."""
