"""Recognises files that are no model to run, and says what to do with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Names of pieces that a file was cut into by bytes, for an upload; llama.cpp's own parts are -00001-of-00003.gguf
_PIECE = re.compile(r"(\.part-?\d*of\d+|\.gguf\.part[-_.]?\w+|\.gguf[-.]split-?\w+|\.gguf\.\d{2,3})$", re.I)
_UNFINISHED = re.compile(r"\.(incomplete|part|partial|download|crdownload|aria2|tmp)$", re.I)
_OLD_EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")
_IK_TYPES = range(133, 400)  # ik_llama.cpp's own formats
_REMOVED = {4, 5, 31, 32, 33, 36, 37, 38}  # formats that llama.cpp no longer reads: Q4_0_4_4 and others

_MAGICS = (
    ((b"tjgg", b"fmgg", b"lmgg", b"algg"), "a model of 2023, before GGUF: get a newer file of it"),
    (
        (b"PK\x03\x04",),
        "a PyTorch checkpoint: convert it to GGUF, or give the folder of its safetensors files",
    ),
    (
        (b"version https://git-lfs",),
        "a pointer of Git LFS, not the file itself: fetch that with `git lfs pull`",
    ),
    ((b"<!DO", b"<htm", b"<HTM"), "a web page, not the file itself: download that again"),
    ((b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd"), "an archive: unpack it first"),
)


def of_bytes(path: Path, head: bytes) -> str:
    """What a file is that begins with `head` and is no GGUF."""
    if cut := of_name(path):
        return cut
    for magics, what in _MAGICS:
        if head.startswith(magics):
            return what
    if head[8:10] == b'{"':
        return "a safetensors file: give its folder, with --engine transformers, or a GGUF of the model"
    return "not a GGUF file; FlashMoE runs GGUF models (a name ending in .gguf)"


def of_name(path: Path) -> str:
    """What a file's name says where it is not a whole file; "" otherwise."""
    if _UNFINISHED.search(path.name):
        return "a download that has not ended: let it go on, or download the file again"
    if _PIECE.search(path.name):
        whole = _PIECE.sub("", path.name)
        whole = whole if whole.endswith(".gguf") else f"{whole}.gguf"
        return (
            f"a piece of a file that was cut for its upload: join all pieces, in order (`cat ... > {whole}`)"
        )
    return ""


def of_type(name: str, number: int) -> str:
    """What a tensor is whose format is not known."""
    if number in _IK_TYPES:
        return (
            f"tensor {name!r} has a format of ik_llama.cpp's own (type {number}), which llama.cpp does not read: "
            "get a quantisation that was made with llama.cpp"
        )
    if number in _REMOVED:
        return (
            f"tensor {name!r} has a format that llama.cpp no longer reads (type {number}): get a Q4_0 or IQ4_NL file, "
            "which it repacks while it loads"
        )
    return f"tensor {name!r} has the unknown type {number}; a newer FlashMoE may read it"


def of_contents(metadata: Mapping[str, Any], tensors: Iterable[str]) -> str:
    """What a GGUF is that is no model of its own, or that llama.cpp reads no more; "" for all others."""
    kind, architecture = (str(metadata.get(f"general.{key}", "")) for key in ("type", "architecture"))
    if architecture == "clip" or kind == "mmproj":
        return "the projector of a model that sees or hears: give the model's own file, and this one with --mmproj"
    if kind == "imatrix":
        return "an importance matrix, which models are quantised with: give a model"
    if kind == "adapter":
        return "an adapter (LoRA) for a model: merge it into that with llama.cpp's llama-export-lora"
    if kind == "vocab":
        return "a vocabulary without weights: give the model's own file"
    if any(_OLD_EXPERT.fullmatch(name) for name in tensors):
        return (
            "made before April 2024, with a tensor for every expert, which llama.cpp reads no more: get a newer file, "
            "or convert the model again"
        )
    return ""
