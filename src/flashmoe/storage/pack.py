"""Pack files: a copy of a model's experts in the layouts that the engine's kernels want on this processor.

MODEL.flashpack, beside MODEL.gguf: magic, header (JSON), a checksum (storage.sums) for every slice, the experts, each
one's repacked planes one after the other, in whole pages. Planes that the engine does not repack stay in the model.

Layouts depend on the processor and on the engine's build, and no name for them is to be trusted: a pack fits if some of
its experts are what the engine makes of the model's, byte for byte.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashmoe.common.units import format_bytes
from flashmoe.errors import FlashMoEError, ModelError
from flashmoe.storage.catalog import ExpertCatalog, Plane
from flashmoe.storage.checksums import Slice, Sums, checksum, differences, no_sums, take_sums
from flashmoe.storage.direct import DirectFile
from flashmoe.storage.gguf import GGUF, header_digest

_MAGIC = b"flashmoe pack 2\n"
_PAGE = 4096
_SAMPLES = 8  # experts that are compared before a pack is used
_MOST_HEADER = 1 << 20
_SPARE = 256 << 20  # of disk space, left free

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Pack:
    """A pack file: where each repacked plane begins, and how far apart an expert's slices of it are."""

    path: Path
    planes: Mapping[str, tuple[int, int]]
    checksums: int  # offset of the table, uint64 for every slice, in the order of the file
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

    def sums(self, catalog: ExpertCatalog) -> Sums:
        """The checksums of the slices that are in the pack. Raises ReadError."""
        slices = list(_slices(catalog, self))
        table = np.empty(len(slices), np.uint64)
        file = DirectFile(self.path)
        try:
            file.read_exact(table.ctypes.data, self.checksums, table.nbytes)
        finally:
            file.close()
        sums = {name: array for name, array in no_sums(catalog).items() if name in self.planes}
        for (plane, expert, _), known in zip(slices, table, strict=True):
            sums[plane.tensor.name][expert] = known
        return sums

    def damaged(self, catalog: ExpertCatalog, progress: Callable[[int], None]) -> list[tuple[str, int]]:
        """(tensor, expert) of slices that are not as they were written; `progress` gets the bytes done, of `size`.

        Raises ReadError.
        """
        expected = self.sums(catalog)
        found = {name: np.zeros_like(array) for name, array in expected.items()}
        slices = (Slice(p.tensor.name, e, 0, offset, p.nbytes) for p, e, offset in _slices(catalog, self))
        take_sums([self.path], slices, found, progress)
        return differences(found, expected)


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
            if length > _MOST_HEADER:
                raise ValueError
            header = json.loads(file.read(length))
            source, names = str(header["source"]), [str(name) for name in header["planes"]]
        pack = _plan(path, catalog, set(names), len(head) + length)
        mine = source == header_digest(catalog.gguf)
        if mine and path.stat().st_size != pack.size:
            raise ValueError
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error):
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
    header = json.dumps({"source": header_digest(catalog.gguf), "planes": sorted(names)}).encode()
    header = _MAGIC + struct.pack("<I", len(header)) + header
    pack = _plan(path, catalog, names, len(header))
    part: str | None = None
    try:
        if pack.size + _SPARE > shutil.disk_usage(path.parent).free:
            raise FlashMoEError(f"{path}: needs {format_bytes(pack.size)} of disk space: make room")
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(header)
            table = []
            for plane, expert, offset in _slices(catalog, pack):
                data = _repacked(plane, expert, files[plane.file])
                table.append(checksum(data.ctypes.data, data.nbytes))
                file.seek(offset)
                file.write(data.data)
                progress(offset, pack.size)
            file.truncate(pack.size)
            file.seek(pack.checksums)
            file.write(np.array(table, np.uint64).tobytes())
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


def _slices(catalog: ExpertCatalog, pack: Pack) -> Iterator[tuple[Plane, int, int]]:
    """(plane, expert, offset) of everything in a pack, in the order of the file."""
    for layer in catalog.layers:
        planes = [p for p in layer.planes if p.tensor.name in pack.planes]
        for expert in range(layer.n_experts):
            for plane in planes:
                offset, stride = pack.planes[plane.tensor.name]
                yield plane, expert, offset + expert * stride


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
    checksums = _pages(header)
    chosen_of = [[p for p in layer.planes if p.tensor.name in names] for layer in catalog.layers]
    slices = sum(len(chosen) * x.n_experts for chosen, x in zip(chosen_of, catalog.layers, strict=True))
    offset = checksums + _pages(8 * slices)
    planes = {}
    for chosen, layer in zip(chosen_of, catalog.layers, strict=True):
        stride, start = sum(_pages(p.nbytes) for p in chosen), offset
        for plane in chosen:
            planes[plane.tensor.name] = start, stride
            start += _pages(plane.nbytes)
        offset += stride * layer.n_experts
    return Pack(path, planes, checksums, offset)


def _pages(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE
