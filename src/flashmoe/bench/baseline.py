"""The model file as the memory-mapped baseline should see it: not in the page cache, at the read-ahead that suits it.

The kernel's read-ahead makes or breaks mmap: 128 KiB suits it, and some drives are set to megabytes. That setting is
the system's and not ours to change; a loop device over the file has one of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

BEST_READ_AHEAD = 128 << 10
_SECTOR = 512


@dataclass(frozen=True)
class OpponentFiles:
    """Where the baseline finds the model (first file of a split set), what was done for it, and all the paths."""

    first: Path
    files: tuple[Path, ...]
    read_ahead: int | None  # bytes; None: unknown
    note: str


@contextmanager
def opponent_files(files: Sequence[Path]) -> Iterator[OpponentFiles]:
    """The model's files at the baseline's best read-ahead. Loop devices and links are gone at the end."""
    own = read_ahead(files[0])
    plain = OpponentFiles(files[0], tuple(files), own, "")
    if own is None or own <= BEST_READ_AHEAD:
        yield plain
        return
    kept = f"mmap runs at this drive's read-ahead of {own >> 10} KiB, which cripples it"
    if os.geteuid() != 0 or not shutil.which("losetup") or not shutil.which("blockdev"):
        yield OpponentFiles(
            files[0], tuple(files), own, f"{kept}; a loop device of 128 KiB needs root and losetup"
        )
        return
    with ExitStack() as stack:
        try:
            devices = [stack.enter_context(_loop_device(path)) for path in files]
        except (OSError, subprocess.SubprocessError) as error:
            yield OpponentFiles(
                files[0], tuple(files), own, f"{kept}; no loop device could be made ({error})"
            )
            return
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flashmoe-bench-")))
        links = [folder / path.name for path in files]  # the names of a split set matter
        for link, device in zip(links, devices, strict=True):
            link.symlink_to(device)
        note = f"mmap runs over a loop device at 128 KiB read-ahead: this drive's {own >> 10} KiB cripple it"
        yield OpponentFiles(links[0], tuple(links), BEST_READ_AHEAD, note)


def read_ahead(path: Path) -> int | None:
    """Read-ahead in bytes of the device that a file is on; None where it cannot be told."""
    device = os.stat(path).st_dev
    setting = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for folder in (setting, setting.resolve().parent):  # a partition has its disk's queue
        try:
            return int((folder / "queue/read_ahead_kb").read_text()) << 10
        except (OSError, ValueError):
            continue
    try:
        return (
            int(Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text()) << 10
        )
    except (OSError, ValueError):
        return None


def drop_from_page_cache(paths: Sequence[Path]) -> None:
    """Let the system forget the pages of these files: each run then starts cold and pays for its own pages."""
    for path in paths:
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


@contextmanager
def _loop_device(path: Path) -> Iterator[str]:
    """A read-only loop device over a file, past the page cache of the file itself, with 128 KiB read-ahead."""
    with ExitStack() as stack:
        if path.stat().st_size % _SECTOR:  # a device has whole sectors: the end of the file would be missing
            path = stack.enter_context(_padded_copy(path))
        made = _run("losetup", "--find", "--show", "--read-only", "--direct-io=on", str(path))
        device = made.strip()
        stack.callback(subprocess.run, ["losetup", "--detach", device], check=False, capture_output=True)
        _run("blockdev", "--setra", str(BEST_READ_AHEAD // _SECTOR), device)
        yield device


@contextmanager
def _padded_copy(path: Path) -> Iterator[Path]:
    """A copy beside the file, filled up to whole sectors. Raises OSError where there is no room."""
    size = path.stat().st_size
    if shutil.disk_usage(path.parent).free < size + (1 << 30):
        raise OSError(f"{path} does not end on a sector and there is no room for a copy that does")
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as copy, open(path, "rb") as source:
            while os.copy_file_range(source.fileno(), copy.fileno(), 64 << 20):
                pass  # shares the blocks where the file system can
            copy.truncate(-(-size // 4096) * 4096)
            os.fsync(copy.fileno())
        yield Path(name)
    finally:
        os.unlink(name)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
