"""Which tensors an architecture has, asked of the installed library; and models made in a process of their own.

`llama_model_init_from_user` makes a model from metadata alone and shows every tensor that it would want, optional ones
too. Where metadata do not fit, an assertion may end the process: so models are made in a child, in one go.
"""

from __future__ import annotations

import ctypes as C
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf

from flashmoe.engines.llamacpp.buffer import ExpertBuffer
from flashmoe.engines.llamacpp.library import find_library, open_library

from .families import Shape, family
from .writer import write, write_metadata


class _InitParams(C.Structure):
    """gguf_init_params"""

    _fields_ = [("no_alloc", C.c_bool), ("ctx", C.c_void_p)]


def wanted(arch: str, keys: dict[str, Any], tokenizer: dict[str, Any]) -> list[tuple[str, Shape]]:
    """Names and shapes, in ggml's order, of all tensors that the library wants, blocks of prediction among them."""
    lib = open_library(find_library())
    params, buffer = lib.llama_model_default_params(), ExpertBuffer(lib)
    params.load_mtp, params.n_gpu_layers = True, 0
    params.tensor_buft_overrides = buffer.overrides(".")  # they take no memory
    fill = C.CFUNCTYPE(None, C.c_void_p, C.c_void_p)(lambda *_: None)
    make, parse = lib.handle.llama_model_init_from_user, lib.handle.gguf_init_from_file
    make.restype, make.argtypes = C.c_void_p, [C.c_void_p, type(fill), C.c_void_p, type(params)]
    parse.restype, parse.argtypes = C.c_void_p, [C.c_char_p, _InitParams]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metadata.gguf"
        writer = gguf.GGUFWriter(path, arch)
        write_metadata(writer, arch, keys, tokenizer=tokenizer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        metadata = parse(str(path).encode(), _InitParams(True, None))
    model = make(metadata, fill, None, params)
    if not model:
        raise ValueError(f"{arch}: {' | '.join(lib.messages[-3:])}")
    lib.llama_model_free(model)
    dims = {
        name: max((i + 1 for i, n in enumerate(ne) if n > 1), default=1) for name, ne in buffer.shapes.items()
    }
    return [(name, ne[: dims[name]]) for name, ne in buffer.shapes.items()]


def families(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """The models called `names` (see `families`), made in `folder` by a child process. Raises ValueError."""
    command = [sys.executable, "-m", "tests.models.library", str(folder), *names]
    child = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    made = {name: folder / f"{name}.gguf" for name in names}
    if child.returncode:
        first = next(name for name, path in made.items() if not path.is_file())
        raise ValueError(f"{first} cannot be made: {child.stderr.strip().splitlines()[-3:]}")
    return made


if __name__ == "__main__":
    for name in sys.argv[2:]:
        path = Path(sys.argv[1]) / f"{name}.gguf"
        write(family(name, wanted), name, path.with_suffix(".part")).rename(path)
