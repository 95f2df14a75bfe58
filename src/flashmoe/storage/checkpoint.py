"""Reads what a safetensors checkpoint says of itself: a folder with config.json and one or several weight files.

A checkpoint is untrusted input, so every length and offset is checked against its file before it is used. Format:
https://huggingface.co/docs/safetensors, and for several files the hub's model.safetensors.index.json.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashmoe.common.text import printable
from flashmoe.errors import ModelError
from flashmoe.storage.gguf import TensorInfo

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # the format's own limit
_MOST_JSON = 256 << 20

#: Bytes of one element.
DTYPES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration and tensors, of all its files; shapes as in torch (the slowest dimension first)."""

    folder: Path
    files: tuple[Path, ...]
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def name(self) -> str:
        """The folder's name."""
        return printable(self.folder.name)

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(path.stat().st_size for path in self.files)

    def only(self, names: Container[str]) -> Checkpoint:
        """The same checkpoint with the tensors in `names`: a model may leave some unused."""
        return replace(self, tensors={name: t for name, t in self.tensors.items() if name in names})


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a folder with a safetensors checkpoint, or looks like one."""
    return os.path.isdir(path) and any((path / name).exists() for name in (CONFIG, SINGLE, INDEX))


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the headers of the checkpoint in a folder.

    Where several files have a tensor, the index says which one counts: a repaired model has it anew in a further file.
    Raises ModelError (missing, unreadable, damaged, truncated, a file of several missing).
    """
    folder = Path(path)
    if not os.path.isdir(folder):
        # of pathlib's, some raise: a name that is too long, a folder that is another user's
        what = "is a file" if os.path.exists(folder) else "no such folder"
        raise ModelError(f"{folder}: {what}; name the folder of the checkpoint, with {CONFIG} in it")
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder}: has no {CONFIG}; name the folder of a Hugging Face checkpoint")
    config = _json(folder / CONFIG)
    files, named = _files(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for tensor in read_header(file):
            if tensor.name not in tensors or folder / named.get(tensor.name, "") == file:
                tensors[tensor.name] = tensor
    return Checkpoint(folder, files, config, tensors)


def _files(folder: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """The weight files, and which of them an index names for a tensor."""
    if (folder / SINGLE).is_file():  # before an index, as for the library
        return (folder / SINGLE,), {}
    if not (folder / INDEX).is_file():
        raise ModelError(
            f"{folder}: has neither {SINGLE} nor {INDEX}; FlashMoE reads safetensors checkpoints only"
        )
    named = _json(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(n, str) for n in named.values()):
        raise ModelError(f"{folder / INDEX}: damaged (no weight_map); download it again")
    files = tuple(sorted({folder / name for name in named.values()}))
    for file in files:
        if not file.is_relative_to(folder) or ".." in file.relative_to(folder).parts:
            raise ModelError(f"{folder / INDEX}: damaged (it names {file.name!r} in another folder)")
        if not os.path.isfile(file):
            raise ModelError(f"{file}: is missing, {INDEX} names it; download the model again")
    return files, named


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_JSON:
            raise ValueError("too long")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path}: damaged (no JSON); download it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: damaged (no JSON object); download it again")
    return value


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file. Raises ModelError when it is unreadable, damaged or truncated."""

    def damaged(what: str) -> ModelError:
        return ModelError(f"{path}: damaged or truncated safetensors file ({what}); download it again")

    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if len(start) < 8:
                raise damaged(f"{size} bytes")
            (length,) = struct.unpack("<Q", start)
            if length > min(MAX_HEADER, size - 8):
                raise damaged(f"a header of {length} bytes in a file of {size}")
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise damaged("the header is no JSON") from None
    if not isinstance(header, dict):
        raise damaged("the header is no JSON object")
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        try:
            kind, shape = entry["dtype"], tuple(entry["shape"])
            first, end = entry["data_offsets"]
            sound = all(isinstance(n, int) and n >= 0 for n in (*shape, first, end))
        except (TypeError, KeyError, ValueError):
            raise damaged(f"tensor {name!r}") from None
        if kind not in DTYPES:
            raise ModelError(
                f"{path}: tensor {name!r} has the unknown type {kind!r}; a newer FlashMoE may read it"
            )
        if not sound or end - first != math.prod(shape) * DTYPES[kind]:
            raise damaged(
                f"tensor {name!r} of type {kind} has the shape {shape} and the bytes {first} to {end}"
            )
        if 8 + length + end > size:
            raise damaged(f"tensor {name!r} ends at byte {8 + length + end}, the file at {size}")
        tensors.append(TensorInfo(name, shape, kind, path, 8 + length + first, end - first))
    return tensors
