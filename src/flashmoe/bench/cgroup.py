"""A memory limit for a child process: a Linux control group of its own, page cache included (version 1 or 2)."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class Usage:
    """What a group has used. `peak` counts page cache and kernel memory; 0 where the kernel does not tell."""

    peak: int
    oom_kills: int


class MemoryGroup:
    """One control group. `limit` None: only counted. A context manager; removed at its end."""

    def __init__(self, folder: Path, version: int, limit: int | None) -> None:
        self._folder, self._version = folder, version
        names = ("memory.limit_in_bytes", "memory.swappiness") if version == 1 else ("memory.max", "")
        if limit is not None:
            (folder / names[0]).write_text(str(limit))
            with suppress(OSError):  # no swap: a limit on memory, not on memory and patience
                (folder / (names[1] or "memory.swap.max")).write_text("0")

    def command(self, command: list[str]) -> list[str]:
        """`command` run inside the group: a shell enters it first, so that everything is counted from the start."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self._folder / "cgroup.procs"), *command]

    def usage(self) -> Usage:
        if self._version == 1:
            peak, events = self._read("memory.max_usage_in_bytes"), self._read("memory.oom_control")
        else:
            peak, events = self._read("memory.peak"), self._read("memory.events")
        fields = dict(line.split() for line in events.splitlines() if len(line.split()) == 2)
        return Usage(int(peak or 0), int(fields.get("oom_kill", 0)))

    def _read(self, name: str) -> str:
        try:
            return (self._folder / name).read_text().strip()
        except OSError:
            return ""

    def close(self) -> None:
        """Remove the group; its last pages may take a moment to go."""
        for _ in range(50):
            with suppress(FileNotFoundError):
                try:
                    self._folder.rmdir()
                except OSError:
                    time.sleep(0.1)
                    continue
            return

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def memory_group(limit: int | None) -> MemoryGroup | None:
    """A new group, or None where there is no right to make one (or no control groups)."""
    for version, parent in _parents():
        folder = parent / f"flashmoe-bench-{os.getpid()}-{time.monotonic_ns()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        needed = "memory.limit_in_bytes" if version == 1 else "memory.max"
        if os.access(folder / needed, os.W_OK) and os.access(folder / "cgroup.procs", os.W_OK):
            try:
                return MemoryGroup(folder, version, min(limit, _NO_LIMIT) if limit is not None else None)
            except OSError:
                pass
        with suppress(OSError):
            folder.rmdir()
    return None


def _parents() -> list[tuple[int, Path]]:
    """(version, folder) where a group might be made: in this process's own, beside it (v2), at the top."""
    try:
        entries = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except (OSError, ValueError):
        return []
    parents = []
    for _, controllers, path in entries:
        if "memory" in controllers.split(","):
            top = _ROOT / "memory"
            parents += [(1, top / path.strip("/")), (1, top)]
        elif controllers == "":
            # a version 2 group with processes in it cannot have limited children: its parent can
            own = _ROOT / path.strip("/")
            parents += [(2, own.parent if own != _ROOT else own), (2, own), (2, _ROOT)]
    return parents
