"""Reads arrays from files that may be damaged: sizes are checked before memory is taken."""

from __future__ import annotations

import math
import os
import tokenize
import zipfile
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

MOST_INFLATED = 100  # an archive may hold so many times its size, and _SMALL more
_SMALL = 16 << 20


def read_safetensors(path: str | Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Metadata and arrays of a .safetensors file. Raises ValueError where it is damaged, OSError where unreadable."""
    try:
        with ExitStack() as stack:
            opened = stack.enter_context(open(path, "rb"))  # the library does not say why it cannot
            name = str(path)
            if name.encode(errors="replace") != os.fsencode(name):  # it takes names in UTF-8 only
                name = f"/proc/self/fd/{opened.fileno()}"
            file = stack.enter_context(safe_open(name, "np"))
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError) as error:  # TypeError: of a type that numpy does not have
        raise ValueError(str(error)) from None


def read_npz(path: str | Path) -> dict[str, NDArray[Any]]:
    """Arrays of a .npz file. Raises ValueError where it is damaged, OSError where unreadable."""
    try:
        with zipfile.ZipFile(path) as archive:
            inflated = sum(info.file_size for info in archive.infolist())
            if inflated > MOST_INFLATED * os.path.getsize(path) + _SMALL:
                raise ValueError(f"{inflated} bytes in a file of {os.path.getsize(path)}")
            for info in archive.infolist():
                with archive.open(info) as member:
                    _check_size(member, info.file_size)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (
        zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, NotImplementedError, RuntimeError,
        SyntaxError, tokenize.TokenError, RecursionError,
    ) as error:  # fmt: skip
        raise ValueError(str(error)) from None


def _check_size(member: IO[bytes], nbytes: int) -> None:
    """Raise ValueError where a .npy member of `nbytes` bytes claims to hold a larger array."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(member)
    if version not in readers:
        raise ValueError(f".npy version {version} is not supported")
    shape, _, kind = readers[version](member)
    if min(shape, default=1) < 0 or math.prod(shape) * kind.itemsize > nbytes:
        raise ValueError(f"an array {list(shape)} of {kind} in {nbytes} bytes")
