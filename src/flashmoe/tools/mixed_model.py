"""A small model with weights of many types, for the self-test: the bundled one's header and routers, random weights.

The bundled model has two types only, and no processor repacks both. This one has those that some processor repacks.
"""

from __future__ import annotations

import ctypes as C
import re
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashmoe.engines.llamacpp.library import Library
from flashmoe.storage.gguf import TYPES, TensorInfo, parse_part, type_number
from flashmoe.storage.hub import demo_model

#: Of each block: types of up and gate, of down (whose rows are too short for some), and of attention.
_BLOCKS = (
    ("Q4_0", "Q4_0", "Q4_0"),
    ("Q4_K", "IQ4_NL", "Q8_0"),
    ("Q2_K", "MXFP4", "Q5_K"),
    ("Q6_K", "Q8_0", "Q4_K"),
)
_COUNT = "olmoe.block_count"


def write_mixed_model(lib: Library, path: Path) -> Path:
    """Write it to `path`: 8 MB. The same at every call."""
    source = parse_part(demo_model())
    data = source.path.read_bytes()
    keys = [data[start:end] for key, (start, end) in source.key_spans.items() if key != _COUNT]
    start, end = source.key_spans[_COUNT]
    keys.append(data[start : end - 4] + struct.pack("<I", len(_BLOCKS)))
    tensors = [tensor for tensor in source.tensors if _block(tensor) < len(_BLOCKS)]
    infos, contents, at = b"", [], 0
    for tensor in tensors:
        kind = _type(tensor)
        content = (
            data[tensor.offset : tensor.offset + tensor.nbytes]
            if kind == tensor.type
            else _random(lib, kind, tensor)
        )
        name = tensor.name.encode()
        infos += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(tensor.shape))
        infos += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
        infos += struct.pack("<IQ", type_number(kind), at)
        contents.append(content + bytes(-len(content) % source.alignment))
        at += len(contents[-1])
    header = b"GGUF" + struct.pack("<IQQ", source.version, len(tensors), len(keys)) + b"".join(keys) + infos
    path.write_bytes(header + bytes(-len(header) % source.alignment) + b"".join(contents))
    return path


def _block(tensor: TensorInfo) -> int:
    match = re.match(r"blk\.(\d+)\.", tensor.name)
    return int(match[1]) if match else -1


def _type(tensor: TensorInfo) -> str:
    """What a tensor's type becomes."""
    if tensor.type == "F32" or _block(tensor) < 0:
        return tensor.type
    wide, narrow, dense = _BLOCKS[_block(tensor)]
    if "_exps" not in tensor.name:
        return dense
    return narrow if "down" in tensor.name else wide


def _random(lib: Library, kind: str, tensor: TensorInfo) -> bytes:
    """Random weights in a type; each expert has the first one's rows in another order, which saves quantising them."""
    number, (columns, rows) = type_number(kind), tensor.shape[:2]
    _, block, block_bytes = TYPES[number]
    rng = np.random.default_rng(number)
    values: NDArray[np.float32] = rng.standard_normal((rows, columns), np.float32) / np.float32(columns**0.5)
    made = np.empty((rows, columns // block * block_bytes), np.uint8)
    quantise = lib._find("ggml_quantize_chunk")
    size = C.c_int64
    quantise.restype = C.c_size_t
    quantise.argtypes = [C.c_int, C.c_void_p, C.c_void_p, size, size, size, C.c_void_p]
    quantise(number, values.ctypes.data, made.ctypes.data, 0, rows, columns, None)
    experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
    return b"".join(
        made[rng.permutation(rows) if expert else slice(None)].tobytes() for expert in range(experts)
    )
