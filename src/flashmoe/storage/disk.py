"""The drive's own ceiling, and how to reach it: measured once per device and size of read, and remembered."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import random
import re
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from flashmoe.common.files import cache_folder, write_atomically
from flashmoe.common.units import format_bytes
from flashmoe.errors import ReadError
from flashmoe.storage.addresses import reserve_huge
from flashmoe.storage.reader import ExpertReader, Read

_log = logging.getLogger(__name__)

_SAMPLE_BYTES = 32 << 20
_ROUNDS = 3
_MOST_SECONDS = 2.0  # no further round after that
_SLOTS = 8
_MOST_HELD = 16 << 20  # bytes of them: a budget counts with so much for all that comes late
_SECONDS = 0.15  # for one rate
_LEAST_FILE = 256 << 20  # smaller files tell nothing about a drive
#: Reads under way and bytes per read (0: whole weights) that are tried; the first is what a reader does untold.
_TRIED = ((128, 0), (8, 0), (2, 0), (128, 512 << 10), (8, 512 << 10))
_BETTER = (
    1.1  # so much faster must another way be, in every round: other programs may use the drive meanwhile
)


@dataclass(frozen=True)
class Drive:
    """What random direct reads reach, in 1e9 bytes per second, with so many reads under way of so many bytes."""

    gb_per_s: float
    depth: int
    chunk: int


def read_ceiling(
    reader: ExpertReader, read_bytes: int, *, fresh: bool = False, reached: float = 0.0
) -> float:
    """1e9 bytes per second of random direct reads of `read_bytes` each, on the drive of the reader's largest file.

    Taken from the notes of an earlier run on the same device where there are some; else, if `fresh`, or where a run has
    `reached` more than is noted, measured now, in about a quarter of a second on an NVMe drive. 0.0 where it means
    nothing: small files, or no direct reads.
    """
    if not _worth_measuring(reader):
        return 0.0
    notes = _read_notes()
    key = _key(reader, read_bytes)
    if fresh or key not in notes or notes[key].gb_per_s < reached:
        try:
            notes[key] = _measure(reader.files[_largest(reader)].path, read_bytes)
        except ReadError:
            return 0.0
        with suppress(OSError):  # measured again next time
            data = json.dumps({name: asdict(drive) for name, drive in notes.items()}, indent=1)
            write_atomically(_notes_file(), data.encode())
    return notes[key].gb_per_s


def tune(reader: ExpertReader, read_bytes: int) -> None:
    """Let the reader do what was fastest for reads of `read_bytes`, if that has been measured on its device."""
    if _worth_measuring(reader) and (drive := _read_notes().get(_key(reader, read_bytes))):
        reader.tune(drive.depth, drive.chunk)
        _log.info("reads on this drive: %s (measured before)", drive)


def _largest(reader: ExpertReader) -> int:
    """Number of the file that tells most: the first one of a split model may hold nothing but its header."""
    return max(range(len(reader.files)), key=lambda number: reader.files[number].size)


def _worth_measuring(reader: ExpertReader) -> bool:
    file = reader.files[_largest(reader)]
    return file.direct and file.size >= _LEAST_FILE


def _key(reader: ExpertReader, read_bytes: int) -> str:
    return f"{os.fstat(reader.files[_largest(reader)].fd).st_dev}:{read_bytes >> 10}KiB"


def _notes_file() -> Path:
    return cache_folder() / "drives.json"


def _read_notes() -> dict[str, Drive]:
    """The notes that are sound."""
    try:
        notes = json.loads(_notes_file().read_text())
        drives = {
            str(key): Drive(float(note["gb_per_s"]), int(note["depth"]), int(note["chunk"]))
            for key, note in notes.items()
        }
    except (OSError, ValueError, AttributeError, TypeError, KeyError, OverflowError):
        return {}
    return {key: drive for key, drive in drives.items() if (drive.depth, drive.chunk) in _TRIED}


def _measure(path: Path, read_bytes: int) -> Drive:
    """Try each way in turn, several times, with a reader of its own: others may be at work. Raises ReadError."""
    with closing(ExpertReader([path])) as reader:
        file = reader.files[0]
        unit = max(file.align, file.align_memory, 4096)
        size = max(unit, min(read_bytes, _MOST_HELD // 2) // unit * unit)
        # the pool's kind of memory: a read into huge pages is one piece for the drive, into small ones it is hundreds;
        # a few slots in turn, so that the measurement fits into a tight budget
        slots = min(_SLOTS, _MOST_HELD // size)
        memory, address = reserve_huge(slots * size)
        reader.keep(memory)  # reads may still be under way where one fails
        ctypes.memset(address, 0, slots * size)  # first touch is not the drive's time
        draw = random.Random(0)
        units = file.size // unit - size // unit
        count = max(_SLOTS, _SAMPLE_BYTES // size)
        rates: dict[tuple[int, int], list[float]] = {way: [] for way in _TRIED}
        began = time.perf_counter()
        for _ in range(_ROUNDS):
            for way, measured in rates.items():
                reader.tune(*way)
                reads = [
                    Read(0, draw.randrange(units) * unit, size, address + i % slots * size)
                    for i in range(count)
                ]
                started = time.perf_counter()
                reader.wait(reader.demand(reads))
                measured.append(count * size / (time.perf_counter() - started) / 1e9)
            if time.perf_counter() - began > _MOST_SECONDS:
                break
    medians = {way: statistics.median(measured) for way, measured in rates.items()}
    usual, best = _TRIED[0], max(_TRIED, key=medians.__getitem__)
    pairs = list(zip(rates[best], rates[usual], strict=True))
    chosen = best if len(pairs) == _ROUNDS and all(a > _BETTER * b for a, b in pairs) else usual
    return Drive(medians[chosen], *chosen)


def rate(reader: ExpertReader, size: int, depth: int) -> float:
    """1e9 bytes per second of random direct reads of `size` bytes, `depth` under way at once. Raises ReadError."""
    held, address = reserve_huge(depth * size)
    ctypes.memset(address, 0, depth * size)  # first touch is not the drive's time
    reader.keep(held)
    draw, units = random.Random(size + depth), (reader.files[0].size - size) // 4096 + 1
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
def sample(place: Path, read_bytes: int) -> Iterator[Path]:
    """A file to try reads of up to `read_bytes` on: the model, any large file that is in the folder, or one that is
    written there and removed. Raises ReadError where none can be.

    place: a model's file, of a split one the first, or a folder.
    """
    there = _large_file(place, read_bytes)
    if there is not None:
        yield there
        return
    folder = place if place.is_dir() else place.parent
    try:
        file = tempfile.NamedTemporaryFile(dir=folder, prefix=".flashmoe-")  # noqa: SIM115 - closed below
    except OSError as error:
        raise _not_written(folder, error) from None
    with file:
        try:
            block = os.urandom(16 << 20)
            for _ in range(_LEAST_FILE // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise _not_written(folder, error) from None
        yield Path(file.name)


def _large_file(place: Path, read_bytes: int) -> Path | None:
    """The largest file of a model that is large enough, or one in a folder that is more than its drive's cache."""
    least = _LEAST_FILE if place.is_dir() else 2 * read_bytes
    found: list[tuple[int, Path]] = []
    with suppress(OSError):
        part = re.fullmatch(r"(.*-)\d{5}(-of-\d{5}\.gguf)", place.name, re.IGNORECASE)
        files = place.iterdir() if place.is_dir() else [place]
        if part and place.is_file():
            files = [
                p for p in place.parent.iterdir() if p.name.startswith(part[1]) and p.name.endswith(part[2])
            ]
        for path in files:
            with suppress(OSError):
                if path.is_file() and os.access(path, os.R_OK) and (size := path.stat().st_size) >= least:
                    found.append((size, path))
    return max(found)[1] if found else None


def _not_written(folder: Path, error: OSError) -> ReadError:
    return ReadError(
        f"{folder}: {format_bytes(_LEAST_FILE)} cannot be written there ({error.strerror}) to measure the drive; name "
        "a model on it, or another folder"
    )
