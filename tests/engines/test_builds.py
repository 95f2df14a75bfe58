"""Layouts derived from headers."""

from __future__ import annotations

import ctypes as C
import json
import re
from pathlib import Path
from typing import Any

import pytest

from flashmoe.engines.llamacpp import abi

FOLDER = Path(abi.__file__).parent / "builds"
NAMES = {
    "llama_model_params": abi.ModelParams,
    "llama_batch": abi.Batch,
    "llama_sampler_chain_params": abi.SamplerChainParams,
    "ggml_tensor": abi.Tensor,
    "llama_model_tensor_buft_override": abi.BufferOverride,
    "ggml_backend_buffer_i": abi.BufferInterface,
    "ggml_init_params": abi.InitParams,
    "ggml_threadpool_params": abi.ThreadpoolParams,
}
KINDS: dict[str, Any] = {
    "ptr": C.c_void_p, "bool": C.c_bool, "char": C.c_char, "i32": C.c_int32, "u32": C.c_uint32, "i64": C.c_int64,
    "size": C.c_size_t, "f32": C.c_float,
}  # fmt: skip


def places(struct: Any) -> list[tuple[int, int]]:
    return [(getattr(struct, name).offset, getattr(struct, name).size) for name, *_ in struct._fields_]


@pytest.mark.parametrize("build", {build.name: build for build in abi.KNOWN_BUILDS.values()}.values())
def test_hand_written_tables_are_the_headers(build: abi.Build) -> None:
    data = next(d for p in FOLDER.glob("*.json") if build.name in (d := json.loads(p.read_text()))["builds"])

    def kind(name: str) -> Any:
        if array := re.fullmatch(r"(.*)\[(\d+)\]", name):
            return kind(array[1]) * int(array[2])
        return C.c_void_p if name.endswith("*") else KINDS[name] if name in KINDS else struct(name)

    def struct(name: str) -> Any:
        fields = [(field, kind(its)) for field, its in data["structs"][name].items()]
        return type(name, (C.Structure,), {"_fields_": fields})

    tables = {
        **NAMES,
        "llama_context_params": build.context_params,
        "ggml_backend_buffer_type": build.buffer_type,
        "ggml_backend_buffer_type_i": build.buffer_type._fields_[0][1],
    }
    for name, table in tables.items():
        derived = struct(name)
        assert (places(table), C.sizeof(table)) == (places(derived), C.sizeof(derived)), name
    assert data["constants"]["LLAMA_LOAD_MODE_NONE"] == abi.LOAD_MODE_NONE
    assert data["constants"]["LLAMA_LOAD_MODE_MMAP"] == abi.LOAD_MODE_MMAP
