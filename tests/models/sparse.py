"""Models larger than the machine: files that are mostly holes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import gguf
import numpy as np

from .families import Family
from .spec import Spec
from .writer import qtype_of, tensor_data, write_metadata


def write_sparse(spec: Spec | Family, path: Path, filled: str = "", router: str = "F32") -> Path:
    """Write a model to `path` and return `path`. Tensors whose names match `filled` have contents, the others none.

    router: the routers' type.
    """
    writer = gguf.GGUFWriter(path, spec.arch)
    write_metadata(writer, spec.arch, spec.metadata())
    tensors = [(name, shape, qtype_of(name, shape, kind, router)) for name, shape, kind in spec.tensors()]
    sizes = []
    for name, shape, quant in tensors:
        block, block_bytes = gguf.GGML_QUANT_SIZES[quant]
        rows = (*shape[:0:-1], shape[0] // block * block_bytes)
        sizes.append(int(np.prod(rows, dtype=np.int64)))
        writer.add_tensor_info(name, rows, np.dtype(np.uint8), sizes[-1], raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        offset = -(-file.seek(0, os.SEEK_END) // 32) * 32
        for (name, shape, quant), nbytes in zip(tensors, sizes, strict=True):
            if filled and re.search(filled, name):
                file.seek(offset)
                file.write(tensor_data(name, shape, quant, spec, 0).tobytes())
            offset += -(-nbytes // 32) * 32
        file.truncate(offset)
    return path
