"""Pack files: a copy of a model's experts in the layouts that the engine's kernels want on this processor.

MODEL.flashpack, beside MODEL.gguf: magic, header (JSON), a CRC-32 for every expert of every layer, the experts, each
one's repacked planes one after the other, in whole pages. Planes that the engine does not repack stay in the model.

Layouts depend on the processor and on the engine's build, and no name for them is to be trusted: a pack fits if some of
its experts are what the engine makes of the model's, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashmoe.errors import FlashMoEError, ModelError
from flashmoe.storage.catalog import ExpertCatalog, Plane
from flashmoe.storage.direct import DirectFile
from flashmoe.storage.gguf import GGUF
from flashmoe.units import format_bytes

_MAGIC = b"flashmoe pack 1\n"
_PAGE = 4096
_SAMPLES = 8  # experts that are compared before a pack is used
_SPARE = 256 << 20  # of disk space, left free

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Pack:
    """A pack file: where each repacked plane begins, and how far apart an expert's slices of it are."""

    path: Path
    planes: Mapping[str, tuple[int, int]]
    checksums: int  # offset of the table, uint32 [layers, experts]
    size: int

    def apply(self, catalog: ExpertCatalog, files: Sequence[DirectFile]) -> ExpertCatalog:
        """The catalog with its repacked planes in this file, the last of `files`.

        `catalog` knows how the engine places them. Raises ModelError where that is not what the pack has.
        """
        placed = {p.tensor.name for layer in catalog.layers for p in layer.planes if p.place}
        known = {p.tensor.name for layer in catalog.layers for p in layer.planes}
        if placed != known & self.planes.keys() or not all(self._fits(*s, files) for s in _samples(catalog)):
            raise ModelError(
                f"{self.path}: made for another processor or another build of llama.cpp; "
                "make it again with `flashmoe pack MODEL`, delete it, or use --layout plain"
            )

        def packed(plane: Plane) -> Plane:
            if not plane.place:
                return plane
            offset, stride = self.planes[plane.tensor.name]
            return replace(plane, file=len(files) - 1, offset=offset, stride=stride, place=None)

        layers = (replace(x, planes=tuple(map(packed, x.planes))) for x in catalog.layers)
        return replace(catalog, layers=tuple(layers))

    def _fits(self, plane: Plane, expert: int, files: Sequence[DirectFile]) -> bool:
        offset, stride = self.planes[plane.tensor.name]
        found = np.empty(plane.nbytes, np.uint8)
        files[-1].read_exact(found.ctypes.data, offset + expert * stride, found.nbytes)
        return np.array_equal(found, _repacked(plane, expert, files[plane.file]))

    def is_whole(self, catalog: ExpertCatalog, progress: Callable[[int], None]) -> bool:
        """Compare every expert with its checksum; `progress` gets the bytes done, of `size`. Raises ReadError."""
        file = DirectFile(self.path)
        try:
            table = np.empty(_table_shape(catalog), np.uint32)
            file.read_exact(table.ctypes.data, self.checksums, table.nbytes)
            found = np.zeros_like(table)
            for layer, expert, plane, offset in _slices(catalog, self):
                data = np.empty(plane.nbytes, np.uint8)
                file.read_exact(data.ctypes.data, offset, data.nbytes)
                found[layer, expert] = zlib.crc32(data.data, int(found[layer, expert]))
                progress(offset)
        finally:
            file.close()
        return np.array_equal(found, table)


def pack_path(gguf: GGUF) -> Path:
    """Where a model's pack is: beside its first file."""
    return gguf.files[0].with_suffix(".flashpack")


def find_pack(catalog: ExpertCatalog) -> Pack | None:
    """The model's pack, if there is one. Raises ModelError for one that is damaged or another model's."""
    path = pack_path(catalog.gguf)
    try:
        with open(path, "rb") as file:
            head = file.read(len(_MAGIC) + 4)
            if not head.startswith(_MAGIC):
                raise ValueError
            length = struct.unpack_from("<I", head, len(_MAGIC))[0]
            header = json.loads(file.read(length))
            source, names = str(header["source"]), [str(name) for name in header["planes"]]
        pack = _plan(path, catalog, set(names), len(head) + length)
        mine = source == _digest(catalog.gguf)
        if mine and path.stat().st_size != pack.size:
            raise ValueError
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        raise ModelError(f"{path}: damaged; make it again with `flashmoe pack MODEL`, or delete it") from None
    if not mine:
        raise ModelError(
            f"{path}: made from another model than {catalog.gguf.files[0].name}; "
            "make it again with `flashmoe pack MODEL`, or delete it"
        )
    return pack


def write_pack(
    catalog: ExpertCatalog, files: Sequence[DirectFile], progress: Callable[[int, int], None]
) -> Pack:
    """Write the model's pack, whole or not at all; `catalog` knows which planes are placed, and how.

    progress: called with the bytes written and to be written. Raises ModelError where the engine repacks nothing, and
    FlashMoEError where the file cannot be written.
    """
    names = {p.tensor.name for layer in catalog.layers for p in layer.planes if p.place}
    path = pack_path(catalog.gguf)
    if not names:
        raise ModelError(
            f"{catalog.gguf.files[0]}: nothing to pack: on this processor llama.cpp uses the layouts of this file"
        )
    header = json.dumps({"source": _digest(catalog.gguf), "planes": sorted(names)}).encode()
    header = _MAGIC + struct.pack("<I", len(header)) + header
    pack = _plan(path, catalog, names, len(header))
    part: str | None = None
    try:
        if pack.size + _SPARE > shutil.disk_usage(path.parent).free:
            raise FlashMoEError(f"{path}: needs {format_bytes(pack.size)} of disk space: make room")
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(header)
            table = np.zeros(_table_shape(catalog), np.uint32)
            for layer, expert, plane, offset in _slices(catalog, pack):
                data = _repacked(plane, expert, files[plane.file])
                table[layer, expert] = zlib.crc32(data.data, int(table[layer, expert]))
                file.seek(offset)
                file.write(data.data)
                progress(offset, pack.size)
            file.truncate(pack.size)
            file.seek(pack.checksums)
            file.write(table.tobytes())
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        shutil.copymode(catalog.gguf.files[0], part)
        os.replace(part, path)
    except OSError as error:
        raise FlashMoEError(
            f"{path}: cannot be written ({error.strerror}); a pack lies beside its model: "
            "copy or link the model to a folder where you may write"
        ) from None
    finally:
        if part:
            with suppress(OSError):
                os.unlink(part)
    return pack


def _slices(catalog: ExpertCatalog, pack: Pack) -> Iterator[tuple[int, int, Plane, int]]:
    """(layer, expert, plane, offset) of everything in a pack, in the order of the file."""
    for i, layer in enumerate(catalog.layers):
        planes = [p for p in layer.planes if p.tensor.name in pack.planes]
        for expert in range(layer.n_experts):
            for plane in planes:
                offset, stride = pack.planes[plane.tensor.name]
                yield i, expert, plane, offset + expert * stride


def _samples(catalog: ExpertCatalog) -> Iterator[tuple[Plane, int]]:
    """Some placed planes of some experts: of all kinds, and from all over the model."""
    everywhere = [(layer, expert) for layer in catalog.layers for expert in range(layer.n_experts)]
    kinds = {tuple((p.tensor.type, p.tensor.shape) for p in x.planes): (x, 0) for x in catalog.layers}
    for layer, expert in [*kinds.values(), *everywhere[:: max(1, len(everywhere) // _SAMPLES)]]:
        yield from ((plane, expert) for plane in layer.planes if plane.place)


def _repacked(plane: Plane, expert: int, file: DirectFile) -> Bytes:
    """An expert's slice of a plane of the model, as the engine places it."""
    plain, placed = np.empty(plane.nbytes, np.uint8), np.empty(plane.nbytes, np.uint8)
    file.read_exact(plain.ctypes.data, plane.offset + expert * plane.stride, plane.nbytes)
    assert plane.place
    plane.place(plain.ctypes.data, placed.ctypes.data)
    return placed


def _plan(path: Path, catalog: ExpertCatalog, names: Collection[str], header: int) -> Pack:
    """Where everything is in a pack of the planes `names` behind a header of that many bytes."""
    layers, experts = _table_shape(catalog)
    checksums = _pages(header)
    offset = checksums + _pages(4 * layers * experts)
    planes = {}
    for layer in catalog.layers:
        chosen = [p for p in layer.planes if p.tensor.name in names]
        stride, start = sum(_pages(p.nbytes) for p in chosen), offset
        for plane in chosen:
            planes[plane.tensor.name] = start, stride
            start += _pages(plane.nbytes)
        offset += stride * layer.n_experts
    return Pack(path, planes, checksums, offset)


def _pages(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE


def _table_shape(catalog: ExpertCatalog) -> tuple[int, int]:
    return len(catalog.layers), catalog.n_experts


def _digest(gguf: GGUF) -> str:
    """Tells the model from others by its files' headers and sizes; its weights are sampled besides."""
    digest = hashlib.sha256()
    for part in gguf.parts:
        with open(part.path, "rb") as file:
            digest.update(file.read(part.data_offset) + struct.pack("<Q", part.size))
    return digest.hexdigest()
