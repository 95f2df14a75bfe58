"""Small files of our own: where they are kept, and how they are written atomically."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

from flashmoe.errors import FlashMoEError, warn

_HEAD = 64 << 10  # bytes that say what a file is
_PRECIOUS = "a model, a trace or a trained file is there"
_LONGEST_SOCKET = 107  # bytes of a socket's path: struct sockaddr_un


def cache_folder() -> Path:
    """The folder for notes that can be made again: $XDG_CACHE_HOME/flashmoe, else ~/.cache/flashmoe.

    Where that cannot be written (a read-only system, a user without a home) a folder of the user's own among temporary
    ones, with a warning; where nothing can be written, the first one still.
    """
    wanted = _folder("XDG_CACHE_HOME", ".cache")
    return _instead_of(wanted) or wanted


def cache_is_kept() -> bool:
    """Whether `cache_folder` is where it belongs."""
    return _instead_of(_folder("XDG_CACHE_HOME", ".cache")) is None


def state_folder() -> Path:
    """The folder for what a user would miss a little: $XDG_STATE_HOME/flashmoe, else ~/.local/state/flashmoe."""
    return _folder("XDG_STATE_HOME", ".local/state")


def _folder(variable: str, default: str) -> Path:
    base = Path(os.environ.get(variable, ""))
    if not base.is_absolute():  # the specification of these variables: such are to be ignored
        try:
            base = Path.home() / default
        except RuntimeError:  # a user id without an entry, as containers have them
            base = Path("/") / default
    return base / "flashmoe"


@cache
def _instead_of(folder: Path) -> Path | None:
    """None where a folder can be written, else the temporary one in its place, or itself where there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        own = _own_temporary_folder()
        where = (
            f"compiled code and notes are kept in {own}" if own else "each start compiles and measures anew"
        )
        warn(
            f"{folder}: cannot be written ({error.strerror}): {where}; name a folder that can be in XDG_CACHE_HOME",
            3,
        )
        return own or folder


def _own_temporary_folder() -> Path | None:
    """A folder that is the same in every process of this user, and that no other user can have made or can write to:
    compiled code is loaded from it."""
    for base in temporary_folders():
        folder = base / f"flashmoe-{os.getuid()}"
        with suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
                return folder
    return None


def temporary_folders() -> Iterator[Path]:
    """Folders for temporary files that can be written, the best first; shared memory last."""
    named = (os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    for base in (*named, "/tmp", "/var/tmp", "/dev/shm"):
        with suppress(OSError):
            if base:
                with tempfile.TemporaryFile(dir=base):
                    yield Path(base).absolute()


def make_socket_folder(name: str) -> Path:
    """A new folder for a socket `name`, whose path must be short. Raises FlashMoEError where none can be made."""
    for base in temporary_folders():
        folder = base / f"flashmoe-{secrets.token_hex(8)}"
        if len(os.fsencode(folder / name)) <= _LONGEST_SOCKET:
            with suppress(OSError):
                folder.mkdir(mode=0o700)
                return folder
    raise FlashMoEError("no temporary folder can be written, or its path is too long: name another in TMPDIR")


def expanded(path: str | Path) -> Path:
    """The path with the home folder in the place of ~; that of a user who does not exist stays as it is."""
    return Path(os.path.expanduser(path))


def replaceable(path: Path, kind: str = "") -> bool:
    """Whether a file of a kind may take the place of what is there: not of a model, nor of a trace or what was trained
    where it is none itself; an option that names the wrong file would cost hours. kind: the format that a file of ours
    says that it has."""
    try:
        there = open(path, "rb", buffering=0).read(_HEAD) if path.is_file() else b""  # noqa: SIM115
    except OSError:
        return True  # whatever is wrong, writing says so
    return _kind(there) in ("", kind)


def _kind(head: bytes) -> str:
    """What a file that begins so is: a GGUF, a safetensors file, or the format of one of ours; "" for all others."""
    if head.startswith(b"GGUF"):
        return "GGUF"
    if head[8:10] != b'{"':  # a safetensors file: the length of a header in JSON, and that
        return ""
    ours = re.search(rb'"format": ?"(flashmoe-[a-z-]+)"', head)
    return ours[1].decode() if ours else "safetensors"


def absent(error: OSError) -> bool:
    """Whether an error of opening says that there is no such file, nor can be."""
    return isinstance(error, FileNotFoundError) or error.errno == errno.ENAMETOOLONG


def write_atomically(path: Path, data: bytes, *, private: bool = False) -> None:
    """Replace `path` with `data` as a whole, or leave it as it was; folders are made. Raises OSError, also where what
    is there took longer to make, see `replaceable`.

    A link stays one: the file that it leads to is replaced. Pipes and devices are written to. private: only the
    user may read it.
    """
    if not replaceable(path, _kind(data[:_HEAD])):
        raise FileExistsError(errno.EEXIST, _PRECIOUS, str(path))
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        path.write_bytes(data)  # by this name: what /dev/fd/63 leads to has none of its own
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        if private:
            os.fchmod(file.fileno(), 0o600)
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file, which takes the place of `path` at the block's end, whole or not at all. Raises OSError.

    path: no link, in a folder that is there.
    """
    part = path.parent / f".{secrets.token_hex(8)}.part"
    try:
        with open(part, "xb") as file:  # its mode follows the umask; that of a file of tempfile does not
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
