"""Checksums of expert slices (XXH3, 64 bits): taken once, compared when a slice is first read.

MODEL.flashsums, beside MODEL.gguf: a .safetensors file with uint64 [experts] for every expert tensor; its metadata says
which model it is of. A pack file has the checksums of its slices in itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save
from xxhash import xxh3_64_intdigest

from flashmoe.common.files import absent, write_atomically
from flashmoe.errors import FlashMoEError, ModelError, ReadError, UsageError
from flashmoe.storage.aio import Read
from flashmoe.storage.arrays import read_safetensors
from flashmoe.storage.catalog import MAX_EXPERTS, ExpertCatalog, ExpertTensor
from flashmoe.storage.gguf import GGUF, header_digest
from flashmoe.storage.reader import ExpertReader

_FORMAT = "1"

#: Checksum of every expert's slice, uint64 [experts], by the tensor's name.
Checksums = Mapping[str, NDArray[np.uint64]]


class Slice(NamedTuple):
    """One expert's part of a tensor: `nbytes` at `offset` of file number `file`."""

    tensor: str
    expert: int
    file: int
    offset: int
    nbytes: int


def slices_of(catalog: ExpertCatalog) -> Iterator[Slice]:
    """Every slice of a model, tensor by tensor."""
    for layer in catalog.layers:
        for p in layer.weights:
            for expert in range(layer.n_experts):
                yield Slice(p.tensor.name, expert, p.file, p.offset + expert * p.stride, p.nbytes)


def no_checksums(catalog: ExpertCatalog) -> dict[str, NDArray[np.uint64]]:
    """Zeros, of the shape of a model's checksums."""
    return {p.tensor.name: np.zeros(x.n_experts, np.uint64) for x in catalog.layers for p in x.weights}


def checksum(address: int, nbytes: int) -> int:
    """XXH3 of memory."""
    return xxh3_64_intdigest((ctypes.c_char * nbytes).from_address(address))


def take_checksums(
    files: Sequence[Path], slices: Iterable[Slice], checksums: Checksums, progress: Callable[[int], None]
) -> None:
    """Read slices and put their checksums into `checksums`; `progress` gets the bytes done so far. Raises ReadError."""
    todo = list(slices)
    with closing(ExpertReader(files)) as reader:
        reader.reserve_bounce_buffers(max(s.nbytes for s in todo))

        def note(source: int, number: int) -> None:
            s = todo[number]
            checksums[s.tensor][s.expert] = checksum(source, s.nbytes)

        done = 0
        for _, group in groupby(enumerate(todo), lambda item: item[1].tensor):
            reads = [Read(s.file, s.offset, s.nbytes, number, note) for number, s in group]
            reader.wait(reader.demand(reads))
            done += sum(read.nbytes for read in reads)
            progress(done)


def differences(found: Checksums, expected: Checksums) -> list[tuple[str, int]]:
    """(tensor, expert) of the slices whose checksums differ."""
    return [(name, int(e)) for name in found for e in np.flatnonzero(found[name] != expected[name])]


def checksums_path(gguf: GGUF) -> Path:
    """Where a model's checksums are: beside its first file."""
    return gguf.files[0].with_suffix(".flashsums")


def find_checksums(catalog: ExpertCatalog) -> Checksums | None:
    """The model's checksums, if they have been taken. Raises ModelError for a file that is damaged or another's."""
    path = checksums_path(catalog.gguf)
    try:
        metadata, checksums = read_safetensors(path)
    except OSError as error:
        if absent(error):
            return None
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ModelError(f"{path}: damaged; delete it, and run `flashmoe verify MODEL`") from None
    shape = {name: (array.shape, array.dtype) for name, array in checksums.items()}
    mine = {name: (array.shape, array.dtype) for name, array in no_checksums(catalog).items()}
    if metadata != _metadata(catalog) or shape != mine:
        raise ModelError(
            f"{path}: of another model than {catalog.gguf.files[0].name}; delete it, and run `flashmoe verify MODEL`"
        )
    return checksums


def write_checksums(catalog: ExpertCatalog, checksums: Checksums) -> None:
    """Write a model's checksums, whole or not at all. Raises FlashMoEError where they cannot be written."""
    path = checksums_path(catalog.gguf)
    try:
        write_atomically(path, save(dict(checksums), _metadata(catalog)))
    except OSError as error:
        raise FlashMoEError(
            f"{path}: cannot be written ({error.strerror}); checksums lie beside their model: "
            "make room, or copy or link the model to a folder where you may write"
        ) from None


def _metadata(catalog: ExpertCatalog) -> dict[str, str]:
    router = catalog.identity.get("router_sha256", "")
    return {"flashmoe_sums": _FORMAT, "header_sha256": header_digest(catalog.gguf), "router_sha256": router}


def needed_checksums(catalog: ExpertCatalog, packed: Checksums) -> Checksums:
    """Checksums of every slice that a session reads: `packed` of what lies in a pack file, the model's of the rest.

    Raises UsageError where they have not been taken, ModelError where they cannot be used.
    """
    if all(p.tensor.name in packed for layer in catalog.layers for p in layer.weights):
        return packed
    checksums = find_checksums(catalog)
    if checksums is None:
        name = catalog.gguf.files[0]
        raise UsageError(f"{name}: no checksums to compare with; take them once with `flashmoe verify MODEL`")
    return {**checksums, **packed}


class FirstReads:
    """Compares every slice with its checksum when it is read for the first time: a check for ExpertReader."""

    def __init__(self, catalog: ExpertCatalog, files: Sequence[Path], checksums: Checksums) -> None:
        """`files`: by number, as the catalog's weights name them; what is beyond the model's own is a pack."""
        self._weights = [
            (i, p, checksums[p.tensor.name]) for i, x in enumerate(catalog.layers) for p in x.weights
        ]
        self._files, self._packs = files, files[len(catalog.gguf.files) :]
        #: (file, offset) of a slice that has not been seen -> number of its weight and expert
        self._unseen = {
            (p.file, p.offset + expert * p.stride): MAX_EXPERTS * number + expert
            for number, (_, p, known) in enumerate(self._weights)
            for expert in range(len(known))
        }

    def __call__(self, read: Read, address: int) -> ReadError | None:
        """What is wrong with the bytes of a read, which are at `address`."""
        found = self._unseen.pop((read.file, read.offset), None)
        if found is None:
            return None
        number, expert = divmod(found, MAX_EXPERTS)
        layer, weight, checksums = self._weights[number]
        if checksum(address, read.nbytes) == int(checksums[expert]):
            return None
        self._unseen[read.file, read.offset] = found
        return ReadError(self._message(layer, weight, expert))

    def _message(self, layer: int, weight: ExpertTensor, expert: int) -> str:
        path = self._files[weight.file]
        then = "make it again with `flashmoe pack MODEL`" if path in self._packs else "get the model again"
        return (
            f"{path}: expert {expert} of layer {layer} ({weight.tensor.name}) is damaged: "
            f"its checksum is not what it was; check the drive, and {then}"
        )
