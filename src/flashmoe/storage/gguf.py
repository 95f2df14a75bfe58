"""Reads what a GGUF file says of itself: metadata, tensors and where their bytes are.

A GGUF is untrusted input, so every count, length and offset is checked against the file before it is used. Values of
long arrays (vocabularies) are stepped over, not built. Format: ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from flashmoe.common.text import printable
from flashmoe.errors import ModelError
from flashmoe.storage import foreign

MAGIC = b"GGUF"
MAX_DIMS = 4
MAX_KEEP = 4096  # arrays up to this many elements are kept as lists, longer ones as their length only
# Beyond all models there are; they bound what a damaged file can cost
MAX_HEADER = 256 << 20
MAX_ENTRIES = 1 << 16  # tensors, and metadata keys
MAX_KEPT = 1 << 20  # elements of arrays that are kept, altogether
MAX_NESTING = 4  # arrays of arrays

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# ggml type number -> (name, elements per block, bytes per block); sizes from ggml's block structs
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}


def type_number(name: str) -> int:
    """ggml's number of a type."""
    return next(number for number, (other, _, _) in TYPES.items() if other == name)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` in ggml's order (fastest first), `offset` in bytes from the start of `file`."""

    name: str
    shape: tuple[int, ...]
    type: str
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUF:
    """A model's metadata and tensors; several parts of a split model count as one."""

    files: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    parts: tuple[Part, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def name(self) -> str:
        """What the model calls itself, else its file's name."""
        return printable(str(self.metadata.get("general.name", self.files[0].stem)))

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(part.size for part in self.parts)

    def arch_value(self, key: str, default: Any = None) -> Any:
        """The value of `<architecture>.<key>`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def arch_int(self, key: str, default: int) -> int:
        """The same for a positive whole number. Raises ModelError where it is none."""
        value = self.arch_value(key, default)
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"{self.files[0]}: damaged GGUF ({key} is {value!r}); download the file again")
        return value


@dataclass
class Part:
    """One file of a model, as parsed; `key_spans` are the byte ranges of the metadata entries in the file."""

    path: Path
    size: int
    version: int = 0
    alignment: int = 32
    data_offset: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    key_spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    tensors: list[TensorInfo] = field(default_factory=list)
    raw: bytes | None = None  # the header, of a file that is somewhere else

    def header(self) -> bytes:
        """The file up to its tensors. Raises ModelError."""
        if self.raw is not None:
            return self.raw
        try:
            with open(self.path, "rb") as file:
                return file.read(self.data_offset)
        except OSError as error:
            raise ModelError(f"{self.path}: cannot be read ({error.strerror})") from None


def header_digest(gguf: GGUF) -> str:
    """Tells a model from others by its files' headers and sizes, not by its weights. Raises OSError."""
    digest = hashlib.sha256()
    for part in gguf.parts:
        with open(part.path, "rb") as file:
            digest.update(file.read(part.data_offset) + struct.pack("<Q", part.size))
    return digest.hexdigest()


class _Header:
    """A cursor over a file's header that refuses to leave the file."""

    def __init__(self, path: Path, size: int, file: Source) -> None:
        self.path, self.size, self.pos = path, size, 0
        self._kept = 0
        self._file = file
        self._data = bytearray()

    def close(self) -> None:
        self._file.close()

    def damaged(self, what: str) -> ModelError:
        if cut := foreign.of_name(self.path):
            return ModelError(f"{self.path}: {cut}")
        return ModelError(f"{self.path}: damaged or truncated GGUF ({what}); download the file again")

    def need(self, n: int) -> int:
        """Make `n` bytes at the cursor available, step over them, and return where they began."""
        start, end = self.pos, self.pos + n
        if n < 0 or end > self.size:
            raise self.damaged(f"the header wants bytes {start} to {end}, the file has {self.size}")
        if end > MAX_HEADER:
            raise self.damaged(f"a header of more than {MAX_HEADER >> 20} MiB")
        while len(self._data) < end:
            chunk = self._file.read(max(1 << 20, end - len(self._data)))
            if not chunk:
                raise self.damaged("the file ends inside its header")
            self._data += chunk
        self.pos = end
        return start

    def take(self, n: int) -> bytes:
        start = self.need(n)
        return bytes(self._data[start : start + n])

    def scalar(self, fmt: str) -> Any:
        size = struct.calcsize("<" + fmt)
        return struct.unpack_from("<" + fmt, self._data, self.need(size))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _ARRAY and depth < MAX_NESTING:
            return self.array(depth)
        raise self.damaged(f"unknown value type {kind}")

    def array(self, depth: int) -> Any:
        """The elements of a short array, the length of a long one."""
        kind, n = self.scalar("I"), self.scalar("Q")
        if n <= MAX_KEEP or kind == _ARRAY:
            self._kept += n
            if self._kept > MAX_KEPT:
                raise self.damaged(f"arrays of more than {MAX_KEPT} elements")
        if kind in _SCALARS:
            fmt = _SCALARS[kind]
            start = self.need(struct.calcsize("<" + fmt) * n)
            return list(struct.unpack_from(f"<{n}{fmt}", self._data, start)) if n <= MAX_KEEP else n
        if n > self.size:
            raise self.damaged(f"an array of {n} elements")
        if kind != _STRING or n <= MAX_KEEP:
            return [self.value(kind, depth + 1) for _ in range(n)]
        unpack, step = struct.Struct("<Q").unpack_from, self.need
        for _ in range(n):
            step(unpack(self._data, step(8))[0])
        return n


class Source(Protocol):
    """The input that a header is read from, from its beginning on."""

    def read(self, n: int, /) -> bytes:
        """The next bytes, any number from 1 to more than `n`; none at the end."""

    def close(self) -> None: ...


def _tensor(header: _Header, part: Part) -> tuple[str, tuple[int, ...], str, int, int]:
    name, n_dims = header.string(), header.scalar("I")
    if n_dims > MAX_DIMS:
        raise header.damaged(f"tensor {name!r} has {n_dims} dimensions")
    shape = tuple(header.scalar("Q") for _ in range(n_dims))
    kind, offset = header.scalar("I"), header.scalar("Q")
    if kind not in TYPES:
        raise ModelError(f"{part.path}: {foreign.of_type(name, kind)}")
    type_name, block, block_bytes = TYPES[kind]
    elements = 1
    for n in shape:
        elements *= n
    if not shape or min(shape) < 1 or shape[0] % block:
        raise header.damaged(f"tensor {name!r} of type {type_name} has the shape {shape}")
    return name, shape, type_name, offset, elements // block * block_bytes


def parse_part(path: Path) -> Part:
    """Parse one GGUF file. Raises ModelError when it is missing, unreadable, not a GGUF, or damaged."""
    try:
        status = os.stat(path)
        size = status.st_size
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise ModelError(f"{path}: is a pipe or a device; name a file")
        header = _Header(path, size, open(path, "rb", buffering=0))  # noqa: SIM115 - closed below
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return _parse(header, Part(path, header.size))
    except IsADirectoryError:
        raise ModelError(f"{path}: is a folder; name the GGUF file in it") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    finally:
        header.close()


def parse_remote(path: Path, size: int, file: Source) -> Part:
    """Parse a GGUF of `size` bytes that is somewhere else; `path` is its name. Raises ModelError."""
    header = _Header(path, size, file)
    part = _parse(header, Part(path, size))
    part.raw = bytes(header._data[: part.data_offset]).ljust(part.data_offset, b"\0")
    return part


def _parse(header: _Header, part: Part) -> Part:
    head = header.take(min(24, header.size))
    if len(head) < 24 or head[:4] != MAGIC:
        raise ModelError(f"{part.path}: {foreign.of_bytes(part.path, head)}")
    header.pos = 4
    part.version = header.scalar("I")
    if part.version not in (2, 3):
        raise ModelError(f"{part.path}: GGUF version {part.version} is not supported (2 and 3 are)")
    n_tensors, n_keys = header.scalar("Q"), header.scalar("Q")
    if max(n_tensors, n_keys) > MAX_ENTRIES or n_tensors > header.size // 24 or n_keys > header.size // 13:
        raise header.damaged(f"{n_tensors} tensors and {n_keys} keys cannot fit")
    for _ in range(n_keys):
        start = header.pos
        key, kind = header.string(), header.scalar("I")
        part.metadata[key] = header.value(kind)
        part.key_spans[key] = (start, header.pos)
    alignment = part.metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise header.damaged(f"alignment {alignment!r}")
    raw = [_tensor(header, part) for _ in range(n_tensors)]
    part.alignment = alignment
    part.data_offset = -(-header.pos // alignment) * alignment
    for name, shape, type_name, offset, nbytes in raw:
        start = part.data_offset + offset
        if start + nbytes > part.size:
            raise header.damaged(f"tensor {name!r} ends at byte {start + nbytes}, the file at {part.size}")
        part.tensors.append(TensorInfo(name, shape, type_name, part.path, start, nbytes))
    return part


def split_paths(first: Path, count: int) -> list[Path]:
    """The files of a split model, from its first ("name-00001-of-00003.gguf")."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", first.name, re.IGNORECASE)
    if not match or int(match[3]) != count:
        raise ModelError(
            f"{first}: says it is one of {count} parts, but is not named -00001-of-{count:05d}.gguf"
        )
    if int(match[2]) != 1:
        raise ModelError(f"{first}: is part {int(match[2])} of a split model; name the first part")
    return [first.with_name(f"{match[1]}-{i:05d}-of-{count:05d}{match[4]}") for i in range(1, count + 1)]


def read_gguf(path: str | Path) -> GGUF:
    """Parse the model at `path`: a single GGUF, or the first file of a split set (the rest is found beside it).

    Raises ModelError (missing, unreadable, not a GGUF, truncated, a part missing, a tensor twice).
    """
    return join(Path(path), parse_part)


def join(path: Path, parse: Callable[[Path], Part]) -> GGUF:
    """The model whose first file is `path`, its files read by `parse`. Raises ModelError as `read_gguf`."""
    first = parse(path)
    count = first.metadata.get("split.count", 1)
    parts = [first]
    if isinstance(count, int) and count > 1:
        parts += [parse(p) for p in split_paths(first.path, count)[1:]]
    tensors: dict[str, TensorInfo] = {}
    for part in parts:
        for tensor in part.tensors:
            if tensor.name in tensors:
                raise ModelError(f"{part.path}: tensor {tensor.name!r} appears twice")
            tensors[tensor.name] = tensor
    return GGUF(tuple(p.path for p in parts), first.metadata, tensors, tuple(parts))
