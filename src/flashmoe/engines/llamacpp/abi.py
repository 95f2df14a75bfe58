"""The layouts of libllama's structs, for the builds that FlashMoE knows.

They come from the headers of each build: scripts/describe_build.py writes builds/*.json, one file for all builds that
are laid out alike. Among them is a private interface (ggml-backend-impl.h: buffer types). A wrong layout crashes: so a
library is read by the one that agrees with what its own functions say (`facts.py`), and tested once (`tested.py`).
"""

from __future__ import annotations

import ctypes as C
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ptr, i32, u32, f32, flag = C.c_void_p, C.c_int32, C.c_uint32, C.c_float, C.c_bool

FOLDER = Path(__file__).parent / "builds"
#: Types as the files name them; `i32*` is a pointer to one, `i32[4]` an array, and any other name a struct.
KINDS: dict[str, Any] = {
    "void": None, "ptr": ptr, "char*": C.c_char_p, "bool": flag, "char": C.c_char, "i8": C.c_int8, "i32": i32,
    "u32": u32, "i64": C.c_int64, "size": C.c_size_t, "f32": f32,
}  # fmt: skip

LOG_CALLBACK = C.CFUNCTYPE(None, C.c_int, C.c_char_p, ptr)
_LAZY_OFF = 0  # of llama_model_params.lazy_mode

Structs = dict[str, Any]
Version = tuple[
    str, str
]  # what llama_version() and ggml_version() return, without "-dev"; "" for no such function


@cache
def _class(name: str, fields: tuple[tuple[str, Any], ...]) -> type[C.Structure]:
    """One and the same for all layouts that agree on a struct: ctypes tells classes apart, not what is in them."""
    return type(name, (C.Structure,), {"_fields_": fields})


def structures(described: Mapping[str, Mapping[str, str]]) -> Structs:
    """Classes of ctypes for structs that are described as name -> field -> type."""
    made: Structs = {}

    def kind(name: str) -> Any:
        if array := re.fullmatch(r"(.*)\[(\d+)\]", name):
            return kind(array[1]) * int(array[2])
        if name in KINDS:
            return KINDS[name]
        if name.endswith("*"):
            return C.POINTER(kind(name[:-1]))
        return struct(name)

    def struct(name: str) -> Any:
        if name not in made:
            made[name] = _class(name, tuple((field, kind(its)) for field, its in described[name].items()))
        return made[name]

    for name in described:
        struct(name)
    return made


@dataclass(frozen=True)
class Layout:
    """How structs are laid out, and constants numbered, in the builds that it names."""

    builds: Mapping[str, Version]
    structs: Structs
    constants: Mapping[str, int]

    def map_file(self, params: Any, wanted: bool) -> None:
        """Have llama_model_params say whether the file is mapped; earlier builds have a flag for it."""
        if hasattr(params, "use_mmap"):
            params.use_mmap = wanted
        else:
            params.load_mode = self.constants[f"LLAMA_LOAD_MODE_{'MMAP' if wanted else 'NONE'}"]
        if not wanted and hasattr(params, "lazy_mode"):
            params.lazy_mode = _LAZY_OFF  # else it maps what it takes for a file


@dataclass(frozen=True)
class Build:
    """A build of llama.cpp that was recognised; `known` unless only its layout is."""

    name: str
    layout: Layout
    known: bool


def read_layouts(folder: Path = FOLDER) -> list[Layout]:
    """All that are known, the latest first."""
    found = []
    for path in folder.glob("*.json"):
        data = json.loads(path.read_text())
        builds = {name: (llama, ggml) for name, (llama, ggml) in data["builds"].items()}
        found.append(Layout(builds, structures(data["structs"]), data["constants"]))
    return sorted(
        found, key=lambda layout: max(numbers(ggml) for _, ggml in layout.builds.values()), reverse=True
    )


def numbers(text: str) -> list[int]:
    """Those in a name or version, for comparison."""
    return [int(part) for part in re.findall(r"\d+", text)]


LAYOUTS = read_layouts()
#: Constants that are the same in all known builds, by their names in the headers.
CONSTANTS = LAYOUTS[0].constants

# What is the same in all known builds (tests/engines/test_builds.py); compiled code counts on it for ggml_tensor.
Batch: Any = LAYOUTS[0].structs["llama_batch"]
BufferInterface: Any = LAYOUTS[0].structs["ggml_backend_buffer_i"]
BufferOverride: Any = LAYOUTS[0].structs["llama_model_tensor_buft_override"]
InitParams: Any = LAYOUTS[0].structs["ggml_init_params"]
_tensor: Any = LAYOUTS[0].structs["ggml_tensor"]


class Tensor(_tensor):
    """ggml_tensor"""


def known_builds() -> str:
    """The builds that are known, in words."""
    versions: dict[str, list[str]] = {}
    for name in sorted((name for layout in LAYOUTS for name in layout.builds), key=numbers):
        package, _, version = name.rpartition(" ")
        versions.setdefault(package, []).append(version)
    return ", ".join(f"{package} {found[0]} to {found[-1]}" for package, found in sorted(versions.items()))
