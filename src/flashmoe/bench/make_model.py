"""Writes a GGUF of random weights in the shape of a real model, in chunks: it says nothing, but costs as much.

The text that comes out is noise, and the routing of random weights has no locality: `--routing TRACE` lends it one.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from flashmoe.bench.blocks import FORMATS
from flashmoe.bench.shapes import Shape, Tensor
from flashmoe.common.units import format_bytes
from flashmoe.errors import FlashMoEError, UsageError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_ALIGNMENT = 4096  # whole pages: direct reads of a slice bring nothing else with it
_CHUNK_WEIGHTS = 16 << 20
_SPARE = 256 << 20  # of disk space, left free


def make_model(
    name: str,
    shape: Shape,
    path: Path,
    *,
    quant: str = "Q4_0",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write a model and return its bytes; the same seed gives the same file. Whole or not at all.

    progress: called with the bytes of tensors written and to be written. Raises UsageError and FlashMoEError.
    """
    try:
        import gguf
    except ImportError:
        raise UsageError("making a model needs the gguf package: pip install 'flashmoe-ssd[bench]'") from None
    if quant not in FORMATS:
        raise UsageError(f"--quant {quant!r}: choose from {', '.join(FORMATS)}")
    tensors = [(tensor, _format_of(tensor, quant)) for tensor in shape.tensors()]
    total = sum(_nbytes(tensor, kind) for tensor, kind in tensors)
    part = path.with_name(f"{path.name}.part")
    try:
        free = shutil.disk_usage(path.parent).free
        if total + _SPARE > free:
            raise FlashMoEError(
                f"{path}: needs {format_bytes(total)}, the disk has {format_bytes(free)} free: choose another place"
            )
        writer = gguf.GGUFWriter(part, shape.arch)
        _add_metadata(writer, name, shape, quant)
        for tensor, kind in tensors:
            _announce(writer, tensor, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout
        _write_tensors(writer.fout[0], tensors, seed, lambda done: progress(done, total))
        writer.close()
        os.replace(part, path)
    except OSError as error:
        raise FlashMoEError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        part.unlink(missing_ok=True)
    return path.stat().st_size


def _format_of(tensor: Tensor, quant: str) -> str:
    """The format of a tensor: MXFP4 is for experts only, as in real models, and rows must be whole blocks."""
    if tensor.plain:
        return "F32"
    if quant == "MXFP4" and "_exps" not in tensor.name:
        quant = "Q8_0"
    if tensor.dims[0] % FORMATS[quant].weights:
        # rows too short for the 256-weight format: same bits per weight
        quant = "Q4_0"
    return quant


def _nbytes(tensor: Tensor, kind: str) -> int:
    weights = int(np.prod(tensor.dims))
    return 4 * weights if kind == "F32" else weights // FORMATS[kind].weights * FORMATS[kind].nbytes


def _announce(writer: GGUFWriter, tensor: Tensor, kind: str) -> None:
    from gguf import GGMLQuantizationType

    rows = tensor.dims[:0:-1]
    if kind == "F32":
        writer.add_tensor_info(tensor.name, tensor.dims[::-1], np.dtype(np.float32), _nbytes(tensor, kind))
    else:
        row = tensor.dims[0] // FORMATS[kind].weights * FORMATS[kind].nbytes
        quantised = GGMLQuantizationType[kind]
        writer.add_tensor_info(
            tensor.name, (*rows, row), np.dtype(np.uint8), _nbytes(tensor, kind), raw_dtype=quantised
        )


def _write_tensors(
    out: BinaryIO, tensors: list[tuple[Tensor, str]], seed: int, progress: Callable[[int], None]
) -> None:
    _pad(out)
    done = 0
    for tensor, kind in tensors:
        for chunk in _chunks(tensor, kind, seed):
            out.write(chunk)
            done += len(chunk)
            progress(done)
        _pad(out)
    out.flush()
    os.fsync(out.fileno())


def _pad(out: BinaryIO) -> None:
    out.write(bytes(-out.tell() % _ALIGNMENT))


def _chunks(tensor: Tensor, kind: str, seed: int) -> Iterator[bytes]:
    """The data of a tensor, a few megabytes at a time, from a generator of its own."""
    draw = np.random.Generator(np.random.SFC64([seed, zlib.crc32(tensor.name.encode())]))
    weights = int(np.prod(tensor.dims))
    for start in range(0, weights, _CHUNK_WEIGHTS):
        n = min(_CHUNK_WEIGHTS, weights - start)
        if kind != "F32":
            yield FORMATS[kind].fill(draw, n // FORMATS[kind].weights, tensor.sigma).tobytes()
        elif tensor.sigma == 0:
            yield np.ones(n, np.float32).tobytes()
        else:
            yield (draw.standard_normal(n, dtype=np.float32) * np.float32(tensor.sigma)).tobytes()


def _add_metadata(writer: GGUFWriter, name: str, shape: Shape, quant: str) -> None:
    writer.add_name(f"{name} shape, random weights ({quant})")
    writer.add_description(
        "Random weights for benchmarks, made by `flashmoe bench make-model`; not a language model."
    )
    writer.add_custom_alignment(_ALIGNMENT)
    add: dict[type, Callable[[str, Any], None]] = {int: writer.add_uint32, float: writer.add_float32}
    for key, value in shape.metadata().items():
        add[type(value)](f"{shape.arch}.{key}", value)
    tokens = _vocabulary(shape.vocab)
    end = len(_byte_letters())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i == end else 1 for i in range(len(tokens))])  # control, normal
    writer.add_token_merges([f"{tokens[ord('t')]} {tokens[ord('h')]}"])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)


def _vocabulary(n: int) -> list[str]:
    """The bytes, an end token, and words that stand for nothing."""
    head = [*_byte_letters(), "<|endoftext|>"]
    return [*head, "th", *(f"w{i}" for i in range(len(head) + 1, n))]


def _byte_letters() -> list[str]:
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    other = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(other)) for byte in range(256)]
