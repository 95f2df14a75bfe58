"""Small files of our own: where they are kept, and how they are written so that half a file is never read."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """The folder for notes that can be made again: $XDG_CACHE_HOME/flashmoe, else ~/.cache/flashmoe."""
    return _folder("XDG_CACHE_HOME", ".cache")


def state_folder() -> Path:
    """The folder for what a user would miss a little: $XDG_STATE_HOME/flashmoe, else ~/.local/state/flashmoe."""
    return _folder("XDG_STATE_HOME", ".local/state")


def _folder(variable: str, default: str) -> Path:
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / default) / "flashmoe"


def write_atomically(path: Path, data: bytes, *, private: bool = False) -> None:
    """Replace `path` with `data` as a whole, or leave it as it was; folders are made. Raises OSError.

    private: only the user may read it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{secrets.token_hex(8)}.part"
    try:
        with open(part, "xb") as file:  # its mode follows the umask; that of a file of tempfile does not
            if private:
                os.fchmod(file.fileno(), 0o600)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
