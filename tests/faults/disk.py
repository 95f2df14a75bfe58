"""A disk that fails on demand: a FUSE file system of one read-only file, in a process of its own.

It speaks the kernel's protocol (linux/fuse.h, version 7) over /dev/fuse, so nothing has to be installed; mounting needs
root. Direct and asynchronous reads of its file take the same way through the kernel as a real disk's, and what this
process answers (an error, fewer bytes, nothing at all, late) is what they get.

    with Disk(folder, model) as disk:
        disk.fault(kind="error", times=2)     # the next two reads fail with EIO
        flashmoe.load(disk.path)
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _STATFS, _RELEASE, _FLUSH, _INIT = 1, 2, 3, 14, 15, 17, 18, 25, 26
_OPENDIR, _RELEASEDIR, _INTERRUPT, _DESTROY, _BATCH_FORGET = 27, 29, 36, 38, 42
_ASYNC_READ, _ASYNC_DIO, _MAX_PAGES = 1 << 0, 1 << 15, 1 << 22
_FOPEN_DIRECT_IO = 1 << 0  # else the kernel takes a short read for the end of the file
_FILE = 2  # a node's number; the folder's is 1
_NAME = b"model.gguf"
_MNT_DETACH = 2


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def why_not() -> str:
    """Why such a disk cannot be had here; "" where it can."""
    if not os.path.exists("/dev/fuse"):
        return "no /dev/fuse on this system"
    return "" if os.geteuid() == 0 else "mounting needs root"


class Server:
    """Answers the kernel. Faults come as lines of JSON on standard input: see `Disk.fault`."""

    def __init__(self, source: str, target: str) -> None:
        self._source = os.open(source, os.O_RDONLY)
        self._device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        if _libc().mount(b"flashmoe-fault", os.fsencode(target), b"fuse", 6, options) != 0:
            raise OSError(ctypes.get_errno(), "mount")
        self._lock = threading.Lock()
        self._fault: dict[str, Any] = {}
        self._held: list[tuple[int, int, int]] = []  # reads without an answer: unique, offset, size
        self.reads = 0

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self._device, (1 << 20) + 4096)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                return  # unmounted
            _, code, unique, node = struct.unpack_from("<IIQQ", request)
            self._answer(code, unique, node, request[40:])

    def _answer(self, code: int, unique: int, node: int, body: bytes) -> None:
        if code == _INIT:
            major, minor, ahead, flags = struct.unpack_from("<IIII", body)
            flags &= _ASYNC_READ | _ASYNC_DIO | _MAX_PAGES
            reply = struct.pack("<IIIIHHIIHH", 7, min(minor, 31), ahead, flags, 64, 48, 1 << 17, 1, 256, 0)
            self._reply(unique, reply.ljust(64, b"\0"))
        elif code == _LOOKUP:
            if body.rstrip(b"\0") == _NAME:
                self._reply(unique, struct.pack("<QQQQII", _FILE, 0, 0, 0, 0, 0) + self._attributes(_FILE))
            else:
                self._reply(unique, b"", errno.ENOENT)
        elif code == _GETATTR:
            self._reply(unique, struct.pack("<QII", 0, 0, 0) + self._attributes(node))
        elif code in (_OPEN, _OPENDIR):
            self._reply(unique, struct.pack("<QII", 0, _FOPEN_DIRECT_IO if code == _OPEN else 0, 0))
        elif code == _READ:
            _, offset, size, _, _, flags = struct.unpack_from("<QQIIQI", body)
            self._read(unique, offset, size, bool(flags & os.O_DIRECT))
        elif code == _STATFS:
            self._reply(unique, bytes(80))
        elif code in (_RELEASE, _RELEASEDIR, _FLUSH, _DESTROY):
            self._reply(unique, b"")
        elif code not in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            self._reply(unique, b"", errno.ENOSYS)

    def _attributes(self, node: int) -> bytes:
        info = os.fstat(self._source)
        mode, size = (stat.S_IFREG | 0o644, info.st_size) if node == _FILE else (stat.S_IFDIR | 0o755, 4096)
        return struct.pack("<6Q10I", node, size, -(-size // 512), 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _read(self, unique: int, offset: int, size: int, direct: bool) -> None:
        with self._lock:
            self.reads += 1
            fault = self._fault
            elsewhere = offset + size < fault.get("reaching", 0) or (fault.get("direct") and not direct)
            if elsewhere:
                fault = {}
            elif fault and fault.get("skip", 0) > 0:
                fault["skip"] -= 1
                fault = {}
            elif fault and "times" in fault:
                fault["times"] -= 1
                if fault["times"] < 0:
                    fault = self._fault = {}
            kind = fault.get("kind")
            if kind == "hang":
                self._held.append((unique, offset, size))
                return
        if kind == "error":
            self._reply(unique, b"", fault.get("errno", errno.EIO))
        elif kind == "slow":
            threading.Timer(fault["seconds"], self._send, (unique, offset, size)).start()
        else:
            self._send(unique, offset, max(512, size // 2 // 512 * 512) if kind == "short" else size)

    def _send(self, unique: int, offset: int, size: int) -> None:
        self._reply(unique, os.pread(self._source, size, offset))

    def _reply(self, unique: int, data: bytes, error: int = 0) -> None:
        with suppress(OSError):  # the reader may have been killed
            os.write(self._device, struct.pack("<IiQ", 16 + len(data), -error, unique) + data)

    def command(self, line: str) -> dict[str, Any]:
        """Take a new fault; answers with what there was."""
        with self._lock:
            self._fault = json.loads(line)
            held = self._held
            if self._fault.get("kind") != "hang":
                self._held = []
        if self._fault.get("kind") != "hang":
            for unique, offset, size in held:
                self._send(unique, offset, size)
        return {"reads": self.reads, "held": len(held)}


class Disk:
    """A mounted disk with one file, `path`, which is `source`. A context manager."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.path = folder, folder / _NAME.decode()
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tests.faults.disk", str(source), str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        self._line()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the disk's server has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def fault(self, **what: Any) -> dict[str, Any]:
        """kind: "error" (with errno), "short", "hang" or "slow" (with seconds), for `times` reads after `skip` good
        ones; direct: only for direct reads; reaching: only for those that reach such an offset; nothing: a sound disk,
        which answers what it has left unanswered. Returns what there was so far."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._line()

    def wait_for_held(self) -> None:
        """Return when a read hangs."""
        while not self.fault(kind="hang")["held"]:
            time.sleep(0.01)

    def __enter__(self) -> Disk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # with its end of /dev/fuse gone, every read under way ends with an error
        self._process.wait()
        _libc().umount2(os.fsencode(self.folder), _MNT_DETACH)


def main() -> None:
    server = Server(sys.argv[1], sys.argv[2])
    threading.Thread(target=server.serve, daemon=True).start()
    print("{}", flush=True)
    for line in sys.stdin:
        print(json.dumps(server.command(line)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
