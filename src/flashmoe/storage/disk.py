"""The drive's own ceiling: what direct reads of expert size reach here, measured once per device and remembered."""

from __future__ import annotations

import ctypes
import json
import os
import random
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flashmoe.errors import ReadError
from flashmoe.storage.files import cache_folder, write_atomically
from flashmoe.storage.memory import reserve_huge
from flashmoe.storage.reader import ExpertReader, Read
from flashmoe.units import format_bytes

_SAMPLE_BYTES = 256 << 20
_SLOTS = 8
_SECONDS = 0.15  # for one rate
_LEAST_FILE = 256 << 20  # smaller files tell nothing about a drive


def read_ceiling(
    reader: ExpertReader, read_bytes: int, *, fresh: bool = False, reached: float = 0.0
) -> float:
    """1e9 bytes per second of random direct reads of `read_bytes` each, on the drive of the reader's first file.

    Taken from the notes of an earlier run on the same device where there are some; else, if `fresh`, or where a run has
    `reached` more than is noted, measured now, in about a tenth of a second on an NVMe drive. 0.0 where it means
    nothing: small files, or no direct reads.
    """
    file = reader.files[0]
    if not file.direct or file.size < _LEAST_FILE:
        return 0.0
    notes = cache_folder() / "drives.json"
    key = f"{os.stat(file.path).st_dev}:{read_bytes >> 10}KiB"
    known = _read_notes(notes)
    if fresh or key not in known or known[key] < reached:
        measured = _measure(reader, read_bytes)
        if not measured:
            return 0.0
        known[key] = measured
        with suppress(OSError):  # measured again next time
            write_atomically(notes, json.dumps(known, indent=1).encode())
    return known[key]


def _read_notes(path: Path) -> dict[str, float]:
    try:
        notes = json.loads(path.read_text())
        return {str(key): float(value) for key, value in notes.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _measure(reader: ExpertReader, read_bytes: int) -> float:
    file = reader.files[0]
    unit = max(file.align, file.align_memory, 4096)
    size = max(unit, min(read_bytes, 8 << 20) // unit * unit)
    count = max(8, _SAMPLE_BYTES // size)
    # the pool's kind of memory: a read into huge pages is one piece for the drive, into small ones it is hundreds;
    # a few slots in turn, so that the measurement fits into a tight budget
    memory, address = reserve_huge(_SLOTS * size)
    ctypes.memset(address, 0, _SLOTS * size)  # first touch is not the drive's time
    draw = random.Random(0)
    units = file.size // unit - size // unit
    reads = [Read(0, draw.randrange(units) * unit, size, address + i % _SLOTS * size) for i in range(count)]
    started = time.perf_counter()
    try:
        reader.wait(reader.demand(reads))
    except ReadError:
        reader.keep(memory)  # reads may still be under way
        return 0.0
    seconds = time.perf_counter() - started
    return count * size / seconds / 1e9


def rate(reader: ExpertReader, size: int, depth: int) -> float:
    """1e9 bytes per second of random direct reads of `size` bytes, `depth` under way at once. Raises ReadError."""
    held, address = reserve_huge(depth * size)
    ctypes.memset(address, 0, depth * size)  # first touch is not the drive's time
    reader.keep(held)
    draw, units = random.Random(size + depth), (reader.files[0].size - size) // 4096
    under_way = deque(
        (i, reader.demand([Read(0, 4096 * draw.randrange(units), size, address + i * size)]))
        for i in range(depth)
    )
    done, began = 0, time.perf_counter()
    while (now := time.perf_counter()) - began < _SECONDS:
        slot, ticket = under_way.popleft()
        reader.wait(ticket)
        done += 1
        read = Read(0, 4096 * draw.randrange(units), size, address + slot * size)
        under_way.append((slot, reader.demand([read])))
    for _, ticket in under_way:
        reader.wait(ticket)
    return done * size / (now - began) / 1e9


@contextmanager
def sample(place: Path) -> Iterator[Path]:
    """A file to read: the model, where it is large enough, or one that is written beside it and removed."""
    if place.is_file() and place.stat().st_size >= _SAMPLE_BYTES:
        yield place
        return
    folder = place if place.is_dir() else place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".flashmoe-") as file:
            block = os.urandom(16 << 20)
            for _ in range(_SAMPLE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            yield Path(file.name)
    except OSError as error:
        raise ReadError(
            f"{folder}: {format_bytes(_SAMPLE_BYTES)} cannot be written there ({error.strerror}); name a model, or "
            "another folder"
        ) from None
