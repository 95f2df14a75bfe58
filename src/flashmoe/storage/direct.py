"""Files read past the page cache, with the alignment that the file system asks for."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
import time
from contextlib import ExitStack, suppress
from mmap import PAGESIZE
from pathlib import Path

from flashmoe.errors import ReadError, warn
from flashmoe.storage.addresses import reserve

_log = logging.getLogger(__name__)

RETRIES = 3
_TRANSIENT = (errno.EIO, errno.EAGAIN, errno.EINTR)
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)  # a file system that does not do direct reads
_FALLBACK_ALIGNMENT = 4096  # fits every common drive; used where the kernel does not tell
_BLOCK_DEVICES = Path("/sys/dev/block")


#: Bytes that arrive beside their place at once; a thread that reads so has a buffer of a little more, for all files.
BOUNCE_BYTES = 1 << 20
_bounce = threading.local()


def _bounce_buffer(nbytes: int) -> int:
    """Address of this thread's page-aligned buffer of at least `nbytes`."""
    if getattr(_bounce, "size", 0) < nbytes:
        _bounce.size = -(-nbytes // PAGESIZE) * PAGESIZE
        _bounce.memory, _bounce.address = reserve(_bounce.size)
    return int(_bounce.address)


class _Statx(ctypes.Structure):
    _fields_ = [
        ("mask", ctypes.c_uint32),
        ("before", ctypes.c_uint8 * 148),
        ("dio_mem_align", ctypes.c_uint32),
        ("dio_offset_align", ctypes.c_uint32),
        ("after", ctypes.c_uint8 * 96),
    ]


def _direct_alignment(path: Path) -> tuple[int, int]:
    """(memory, offset) alignment in bytes for direct reads of `path`, from statx(2) STATX_DIOALIGN.

    Linux before 6.1 does not tell; then it is the drive's logical block, which such a kernel asks of addresses as well.
    """
    at_fdcwd, statx_dioalign = -100, 0x2000
    result = _Statx()
    try:
        status = ctypes.CDLL(None, use_errno=True).statx(
            at_fdcwd, os.fsencode(path), 0, statx_dioalign, ctypes.byref(result)
        )
    except AttributeError:  # not Linux, or a C library without statx
        status = -1
    if status != 0 or not result.mask & statx_dioalign or not result.dio_offset_align:
        block = _logical_block(path)
        return block, block
    return result.dio_mem_align, result.dio_offset_align


def _logical_block(path: Path) -> int:
    """Bytes of a logical block of the drive that a file is on; a page where there is no such drive (network, btrfs)."""
    with suppress(OSError, ValueError):
        device = os.stat(path).st_dev
        folder = (_BLOCK_DEVICES / f"{os.major(device)}:{os.minor(device)}").resolve(strict=True)
        for place in (folder, folder.parent):  # a partition has the queue of its disk
            if (queue := place / "queue/logical_block_size").exists():
                return int(queue.read_text())
    return _FALLBACK_ALIGNMENT


class DirectFile:
    """A file open for O_DIRECT reads, or for buffered ones where the file system refuses them (tmpfs, overlay).

    `align` is the unit of file offsets and lengths and `align_memory` that of addresses; both are 1 when buffered. Some
    file systems (ZFS, FUSE, those of networks) open a file for direct reads and refuse the reads, or its last one: from
    then on it is read through the page cache, and the units stay.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._refusal = threading.Lock()
        direct = getattr(os, "O_DIRECT", 0)
        self.direct = bool(direct)
        try:
            try:
                self.fd = os.open(path, os.O_RDONLY | direct)
            except OSError as error:
                if error.errno not in _NOT_DIRECT:
                    raise
                self.fd, self.direct = os.open(path, os.O_RDONLY), False
        except OSError as error:
            raise ReadError(f"{path}: cannot be opened ({error.strerror})") from None
        if not self.direct:
            _log.warning("%s: no direct reads (O_DIRECT) here: reading through the page cache", path)
        with ExitStack() as undo:
            undo.callback(self.close)
            self.align_memory, self.align = _direct_alignment(path) if self.direct else (1, 1)
            self._stamp = self._stat()
            self.size = self._stamp[0]
            undo.pop_all()

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self.fd)
        return status.st_size, status.st_mtime_ns

    def check_unchanged(self) -> None:
        """Raise ReadError where the file has been written to since it was opened.

        A file that was renamed or deleted goes on to be the same; one that was overwritten in place does not.
        """
        if self._stat() != self._stamp:
            raise ReadError(f"{self.path}: has changed while in use; load the model again")

    def _read_buffered(self, reason: str) -> bool:
        """A direct read was refused: open the file anew, for reads through the page cache, if that has not been done.
        False where it cannot be."""
        with self._refusal:
            if not self.direct:
                return True
            try:
                # the same file, also where its name is another's by now; reads under way keep the old opening
                again = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY)
            except OSError:
                return False
            os.dup2(again, self.fd, inheritable=False)
            os.close(again)
            self.direct = False
        warn(
            f"{self.path}: its file system refuses direct reads ({reason}): reading through the page cache, which "
            "is slower and takes memory; keep models on a local ext4, xfs or btrfs file system"
        )
        return True

    def close(self) -> None:
        os.close(self.fd)

    def read_enclosing(self, address: int, offset: int, nbytes: int) -> None:
        """Read `nbytes` at `offset` to `address`, together with what alignment adds on either side.

        The caller owns that surrounding memory (up to `align` - 1 bytes before and after). Raises ReadError.
        """
        head = offset % self.align
        if (address - head) % self.align_memory:
            self.read_exact(address, offset, nbytes)
        else:
            length = -(-(head + nbytes) // self.align) * self.align
            self._fill(address - head, offset - head, length, head + nbytes)

    def read_exact(self, address: int, offset: int, nbytes: int) -> None:
        """Read `nbytes` at `offset` to `address` and touch nothing around it (one copy more). Raises ReadError."""
        for done in range(0, nbytes, BOUNCE_BYTES):
            first, count = offset + done, min(nbytes - done, BOUNCE_BYTES)
            head = first % self.align
            length = -(-(head + count) // self.align) * self.align
            source = _bounce_buffer(length)
            self._fill(source, first - head, length, head + count)
            ctypes.memmove(address + done, source + head, count)

    def _fill(self, address: int, offset: int, length: int, needed: int) -> None:
        """pread until `needed` of `length` bytes are in; retries transient errors, then raises ReadError."""
        done, failures = 0, 0
        while done < needed:
            direct = self.direct
            target = (ctypes.c_char * (length - done)).from_address(address + done)
            try:
                count = os.preadv(self.fd, [target], offset + done)
            except OSError as error:
                if direct and error.errno in _NOT_DIRECT and self._read_buffered(os.strerror(error.errno)):
                    continue
                failures += 1
                if error.errno not in _TRANSIENT or failures > RETRIES:
                    raise ReadError(
                        f"{self.path}: reading at byte {offset} failed ({error.strerror})"
                    ) from None
                _log.warning(
                    "%s: reading at byte %d failed (%s): trying again, %d of %d",
                    self.path,
                    offset + done,
                    error.strerror,
                    failures,
                    RETRIES,
                )
                time.sleep(0.01 * 2**failures)
                continue
            # a direct read may stop short: go on from the last whole unit
            unit = self.align if direct else 1
            progress = count if done + count >= needed else count - count % unit
            if progress == 0:
                short = offset + done + count < os.fstat(self.fd).st_size
                if direct and short and self._read_buffered("they stop short"):
                    continue
                raise ReadError(
                    f"{self.path}: ends at byte {offset + done + count}; it was truncated while in use"
                )
            done += progress
