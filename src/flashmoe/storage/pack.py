"""Pack files: a copy of a model's experts in the layouts that the engine's kernels want on this processor.

MODEL.flashpack, beside MODEL.gguf: magic, header (JSON), a checksum (storage.checksums) for every slice, the experts,
each one's repacked weights one after the other, in whole pages. What the engine does not repack stays in the model.

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
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashmoe.common.files import absent
from flashmoe.common.units import format_bytes
from flashmoe.errors import FlashMoEError, ModelError
from flashmoe.storage.catalog import ExpertCatalog, ExpertTensor
from flashmoe.storage.checksums import Checksums, Slice, checksum, differences, no_checksums, take_checksums
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
    """A pack file: where each repacked weight begins, and how far apart an expert's slices of it are."""

    path: Path
    weights: Mapping[str, tuple[int, int]]
    checksums_at: int  # offset of the table, uint64 for every slice, in the order of the file
    size: int

    def apply(self, catalog: ExpertCatalog, files: Sequence[DirectFile]) -> ExpertCatalog:
        """The catalog with its repacked weights in this file, the last of `files`.

        `catalog` knows how the engine places them. Raises ModelError where that is not what the pack has.
        """
        placed = {p.tensor.name for layer in catalog.layers for p in layer.weights if p.place}
        known = {p.tensor.name for layer in catalog.layers for p in layer.weights}
        if placed != known & self.weights.keys() or not all(self._fits(*s, files) for s in _samples(catalog)):
            raise ModelError(
                f"{self.path}: made for another processor, other kernels or another build of llama.cpp; "
                "make it again with `flashmoe pack MODEL`, delete it, or use --layout plain"
            )

        def packed(weight: ExpertTensor) -> ExpertTensor:
            if not weight.place:
                return weight
            offset, stride = self.weights[weight.tensor.name]
            return replace(weight, file=len(files) - 1, offset=offset, stride=stride, place=None)

        layers = (replace(x, weights=tuple(map(packed, x.weights))) for x in catalog.layers)
        return replace(catalog, layers=tuple(layers))

    def _fits(self, weight: ExpertTensor, expert: int, files: Sequence[DirectFile]) -> bool:
        offset, stride = self.weights[weight.tensor.name]
        found = np.empty(weight.nbytes, np.uint8)
        files[-1].read_exact(found.ctypes.data, offset + expert * stride, found.nbytes)
        return np.array_equal(found, _repacked(weight, expert, files[weight.file]))

    def checksums(self, catalog: ExpertCatalog) -> Checksums:
        """The checksums of the slices that are in the pack. Raises ReadError."""
        slices = list(_slices(catalog, self))
        table = np.empty(len(slices), np.uint64)
        with closing(DirectFile(self.path)) as file:
            file.read_exact(table.ctypes.data, self.checksums_at, table.nbytes)
        checksums = {name: array for name, array in no_checksums(catalog).items() if name in self.weights}
        for (weight, expert, _), known in zip(slices, table, strict=True):
            checksums[weight.tensor.name][expert] = known
        return checksums

    def damaged(self, catalog: ExpertCatalog, progress: Callable[[int], None]) -> list[tuple[str, int]]:
        """(tensor, expert) of slices that are not as they were written; `progress` gets the bytes done, of `size`.

        Raises ReadError.
        """
        expected = self.checksums(catalog)
        found = {name: np.zeros_like(array) for name, array in expected.items()}
        slices = (Slice(p.tensor.name, e, 0, offset, p.nbytes) for p, e, offset in _slices(catalog, self))
        take_checksums([self.path], slices, found, progress)
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
    except OSError as error:
        if absent(error):
            return None
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError, struct.error):
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
    """Write the model's pack, whole or not at all; `catalog` knows which weights are placed, and how.

    progress: called with the bytes written and to be written. Raises ModelError where the engine repacks nothing, and
    FlashMoEError where the file cannot be written.
    """
    names = {p.tensor.name for layer in catalog.layers for p in layer.weights if p.place}
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
            for weight, expert, offset in _slices(catalog, pack):
                data = _repacked(weight, expert, files[weight.file])
                table.append(checksum(data.ctypes.data, data.nbytes))
                file.seek(offset)
                file.write(data.data)
                progress(offset, pack.size)
            file.truncate(pack.size)
            file.seek(pack.checksums_at)
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


def _slices(catalog: ExpertCatalog, pack: Pack) -> Iterator[tuple[ExpertTensor, int, int]]:
    """(weight, expert, offset) of everything in a pack, in the order of the file."""
    for layer in catalog.layers:
        weights = [p for p in layer.weights if p.tensor.name in pack.weights]
        for expert in range(layer.n_experts):
            for weight in weights:
                offset, stride = pack.weights[weight.tensor.name]
                yield weight, expert, offset + expert * stride


def _samples(catalog: ExpertCatalog) -> Iterator[tuple[ExpertTensor, int]]:
    """Some placed weights of some experts: of all kinds, and from all over the model."""
    everywhere = [(layer, expert) for layer in catalog.layers for expert in range(layer.n_experts)]
    kinds = {tuple((p.tensor.type, p.tensor.shape) for p in x.weights): (x, 0) for x in catalog.layers}
    for layer, expert in [*kinds.values(), *everywhere[:: max(1, len(everywhere) // _SAMPLES)]]:
        yield from ((weight, expert) for weight in layer.weights if weight.place)


def _repacked(weight: ExpertTensor, expert: int, file: DirectFile) -> Bytes:
    """An expert's slice of a weight of the model, as the engine places it."""
    plain, placed = np.empty(weight.nbytes, np.uint8), np.empty(weight.nbytes, np.uint8)
    file.read_exact(plain.ctypes.data, weight.offset + expert * weight.stride, weight.nbytes)
    assert weight.place
    weight.place(plain.ctypes.data, placed.ctypes.data)
    return placed


def _plan(path: Path, catalog: ExpertCatalog, names: Collection[str], header: int) -> Pack:
    """Where everything is in a pack of the weights `names` behind a header of that many bytes."""
    checksums = _pages(header)
    chosen_of = [[p for p in layer.weights if p.tensor.name in names] for layer in catalog.layers]
    slices = sum(len(chosen) * x.n_experts for chosen, x in zip(chosen_of, catalog.layers, strict=True))
    offset = checksums + _pages(8 * slices)
    weights = {}
    for chosen, layer in zip(chosen_of, catalog.layers, strict=True):
        stride, start = sum(_pages(p.nbytes) for p in chosen), offset
        for weight in chosen:
            weights[weight.tensor.name] = start, stride
            start += _pages(weight.nbytes)
        offset += stride * layer.n_experts
    return Pack(path, weights, checksums, offset)


def _pages(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE
