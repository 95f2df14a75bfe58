"""The message where an assertion of the library ends the process: compiled, since any thread may fail."""

from __future__ import annotations

import ctypes as C
from contextlib import suppress
from typing import Any

import numpy as np
from numba import types

from flashmoe.common.kept import kept_callback
from flashmoe.engines.llamacpp.library import Library

_BEFORE = np.frombuffer(b"error: llama.cpp has ended this process (", np.uint8)
_AFTER = np.frombuffer(
    b"); the model may be damaged: if llama.cpp itself runs it, please report it, with the command\n",
    np.uint8,
)
_STDERR = 2
_write: Any = types.ExternalFunction("write", types.int64(types.int32, types.uintp, types.uintp))
_strlen: Any = types.ExternalFunction("strlen", types.uintp(types.uintp))


@kept_callback(types.void(types.uintp))
def _on_abort(message: Any) -> None:
    _write(_STDERR, _BEFORE.ctypes.data, len(_BEFORE))
    _write(_STDERR, message, _strlen(message))
    _write(_STDERR, _AFTER.ctypes.data, len(_AFTER))


def arrange(lib: Library) -> None:
    """Have it said."""
    for handle in (lib.handle, *([C.CDLL(str(lib.module))] if lib.module else [])):
        with suppress(AttributeError):  # in a library of its own beside this one
            handle.ggml_set_abort_callback.argtypes = [C.c_void_p]
            handle.ggml_set_abort_callback.restype = C.c_void_p
            handle.ggml_set_abort_callback(_on_abort.address)
