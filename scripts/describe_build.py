"""Describes a build of llama.cpp for FlashMoE: python scripts/describe_build.py SOURCE...

SOURCE: a checkout of llama.cpp, a source archive of xllamacpp or llama-cpp-python, or one of their wheels, whose source
archive is then fetched with pip. From its headers come the layouts and constants that FlashMoE uses, into a file of
src/flashmoe/engines/llamacpp/builds/: a new one, or where a known build has the same layouts the name is added there.
"""

from __future__ import annotations

import argparse
import ctypes as C
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import clang.cindex as clang

from flashmoe.engines.llamacpp import abi
from flashmoe.engines.llamacpp.library import PROTOTYPES

FOLDER = Path(abi.__file__).parent / "builds"
HEADERS = ("include", "ggml/include", "ggml/src")
TARGETS = ("x86_64-linux-gnu", "aarch64-linux-gnu")
STRUCTS = (
    "llama_model_params", "llama_context_params", "llama_batch", "llama_sampler_chain_params", "llama_sampler",
    "llama_model_tensor_buft_override", "ggml_tensor", "ggml_init_params", "ggml_threadpool_params",
    "ggml_backend_buffer_type_i", "ggml_backend_buffer_type", "ggml_backend_buffer_i",
)  # fmt: skip
CONSTANTS = (
    *(f"GGML_TYPE_{name}" for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "I32")),
    *(f"LLAMA_POOLING_TYPE_{name}" for name in ("NONE", "MEAN", "CLS", "LAST")),
    *(f"GGML_LOG_LEVEL_{name}" for name in ("WARN", "ERROR", "CONT")),
    "GGML_OP_NONE", "GGML_STATUS_FAILED", "GGML_BACKEND_DEVICE_TYPE_CPU", "GGML_BACKEND_BUFFER_USAGE_WEIGHTS",
    "LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY",
)  # fmt: skip
OTHER_CONSTANTS = (  # which differ, or which earlier builds have not
    "GGML_TYPE_COUNT", "LLAMA_LOAD_MODE_NONE", "LLAMA_LOAD_MODE_MMAP",
)  # fmt: skip

# The headers want a few types of the C library's. With these, no system's headers are needed, for any target.
_INTEGERS = "".join(
    f"typedef __{u}INT{n}_TYPE__ {u.lower()}int{n}_t;\n" for n in (8, 16, 32, 64) for u in ("", "U")
)
_C_LIBRARY = {
    "stdbool.h": "#define bool _Bool\n#define true 1\n#define false 0\n",
    "stddef.h": "typedef __SIZE_TYPE__ size_t;\n",
    "stdint.h": f"{_INTEGERS}typedef __UINTPTR_TYPE__ uintptr_t;\n#define SIZE_MAX __SIZE_MAX__\n",
    "stdio.h": "typedef struct file FILE;\n",
}
_KIND = clang.TypeKind
_NUMBERS = {
    _KIND.BOOL: "bool", _KIND.SCHAR: "i8", _KIND.CHAR_S: "char", _KIND.CHAR_U: "char", _KIND.INT: "i32",
    _KIND.UINT: "u32", _KIND.LONG: "i64", _KIND.ULONG: "size", _KIND.FLOAT: "f32", _KIND.VOID: "void",
    _KIND.ENUM: "i32",
}  # fmt: skip


class NotDescribed(Exception):
    """Why a build cannot be described."""


def kind_of(kind: Any, depth: int = 0) -> str:
    """A C type as the data files name it: pointers to numbers with a star, all others as `ptr`."""
    kind = kind.get_canonical()
    if kind.kind == _KIND.CONSTANTARRAY:
        return f"{kind_of(kind.element_type, depth)}[{kind.element_count}]"
    if kind.kind == _KIND.POINTER:
        inner = kind_of(kind.get_pointee(), depth + 1)
        return f"{inner}*" if re.fullmatch(r"(i8|i32|f32|char)\**", inner) else "ptr"
    if kind.kind == _KIND.RECORD:
        return str(kind.spelling.split()[-1])
    if kind.kind in _NUMBERS:
        return _NUMBERS[kind.kind]
    if depth:
        return "other"
    raise NotDescribed(f"has a type that the data files have no name for: {kind.spelling}")


class Headers:
    """The headers of one build, for one target."""

    def __init__(self, root: Path, target: str) -> None:
        includes = "".join(f'#include "{name}.h"\n' for name in ("llama", "ggml-cpu", "ggml-backend-impl"))
        macros = "".join(f"#ifdef {n}\nenum {{ value_of_{n} = {n} }};\n#endif\n" for n in CONSTANTS)
        files = [(f"/c/{name}", text) for name, text in _C_LIBRARY.items()]
        self._unit = clang.Index.create().parse(
            "build.c",
            ["-nostdinc", "-target", target, "-isystem", "/c", *(f"-I{root / folder}" for folder in HEADERS)],
            [*files, ("build.c", includes + macros)],
        )
        if errors := [d for d in self._unit.diagnostics if d.severity >= clang.Diagnostic.Error]:
            raise NotDescribed(f"{errors[0]}")

    def structs(self) -> dict[str, dict[str, str]]:
        """Of every struct that is used, the fields and their types. Raises NotDescribed where ctypes would lay one out
        in another way."""
        found = {
            node.spelling: node.type
            for node in self._unit.cursor.get_children()
            if node.kind == clang.CursorKind.STRUCT_DECL and node.is_definition()
        }
        made = {}
        for name in STRUCTS:
            if name not in found:
                raise NotDescribed(f"has no struct {name}")
            fields = list(found[name].get_fields())
            if any(field.is_bitfield() for field in fields):
                raise NotDescribed(f"has bit fields in {name}")
            made[name] = {field.spelling: kind_of(field.type) for field in fields}
        for name, ours in abi.structures(made).items():
            places = {field: found[name].get_offset(field) // 8 for field in made[name]}
            if C.sizeof(ours) != found[name].get_size() or any(
                getattr(ours, field).offset != place for field, place in places.items()
            ):
                raise NotDescribed(f"aligns {name} in a way that ctypes does not")
        return made

    def constants(self) -> dict[str, int]:
        values: dict[str, int] = {}
        for node in self._unit.cursor.get_children():
            if node.kind == clang.CursorKind.ENUM_DECL:
                values |= {n.spelling.removeprefix("value_of_"): n.enum_value for n in node.get_children()}
        if missing := [name for name in CONSTANTS if name not in values]:
            raise NotDescribed(f"has no {', '.join(missing)}")
        return {name: values[name] for name in (*CONSTANTS, *OTHER_CONSTANTS) if name in values}

    def check_functions(self) -> None:
        """Raise NotDescribed where a function that is called takes or returns other things than it is declared with."""
        found = {
            node.spelling: (kind_of(node.result_type, 1), *(kind_of(a.type, 1) for a in node.get_arguments()))
            for node in self._unit.cursor.get_children()
            if node.kind == clang.CursorKind.FUNCTION_DECL
        }
        for name, (result, arguments) in PROTOTYPES.items():
            declared = (result, *arguments)
            if name in found and not (
                len(declared) == len(found[name]) and all(map(_agree, declared, found[name]))
            ):
                raise NotDescribed(f"declares {name} as {found[name]}")


def _agree(ours: Any, theirs: str) -> bool:
    """Whether a type of ctypes, or the name of a struct, can stand for what a header says."""
    if isinstance(ours, str):
        return ours == theirs
    if ours is None:
        return theirs == "void"
    if theirs == "ptr" or theirs.endswith("*"):
        return C.sizeof(ours) == C.sizeof(C.c_void_p) and ours not in (C.c_int64, C.c_size_t)
    return ours is abi.KINDS.get(theirs)


def describe(root: Path) -> dict[str, Any]:
    """The layouts and constants of the llama.cpp in a folder, which must be the same for all targets."""
    facts = []
    for target in TARGETS:
        headers = Headers(root, target)
        headers.check_functions()
        facts.append({"structs": headers.structs(), "constants": headers.constants()})
    if any(other != facts[0] for other in facts):
        raise NotDescribed("differs from one processor to another")
    return facts[0]


def versions(root: Path) -> list[str]:
    """What llama_version() and ggml_version() return, but for "-dev"; "" where a build has no such function."""
    found = []
    for name, file in (("LLAMA", "CMakeLists.txt"), ("GGML", "ggml/CMakeLists.txt")):
        text = (root / file).read_text()
        parts = [
            re.search(rf"set\({name}_VERSION_{part} (\d+)\)", text) for part in ("MAJOR", "MINOR", "PATCH")
        ]
        found.append(".".join(part[1] for part in parts if part))
    return found


def unpack(source: Path, folder: Path) -> tuple[str, Path]:
    """The name of a build and the folder of its llama.cpp. Raises NotDescribed."""
    if source.suffix == ".whl":
        package, version = source.name.split("-")[:2]
        source = _source_archive(package, version, folder)
    if source.is_dir():
        name, folder = f"llama.cpp {versions(source)[0] or versions(source)[1]}", source
    elif source.name.endswith(".tar.gz"):
        package, version = source.name.removesuffix(".tar.gz").rsplit("-", 1)
        name = f"{package.replace('_', '-')} {version}"
        with tarfile.open(source) as archive:
            wanted = [
                m for m in archive if re.search(r"llama\.cpp/(.*/)?(CMakeLists\.txt|[\w-]+\.h)$", m.name)
            ]
            archive.extractall(folder, wanted)
    else:
        raise NotDescribed("is no folder, source archive or wheel")
    headers = sorted(folder.rglob("ggml/src/ggml-backend-impl.h"), key=lambda path: len(path.parts))
    if not headers:
        raise NotDescribed("has no ggml/src/ggml-backend-impl.h")
    return name, headers[0].parents[2]


def _source_archive(package: str, version: str, folder: Path) -> Path:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        f"--no-binary={package}",
        "--dest",
        str(folder),
    ]
    subprocess.run([*pip, f"{package}=={version}"], check=True)
    return next(folder.glob("*.tar.gz"))


def add(name: str, version: list[str], facts: dict[str, Any], folder: Path) -> str:
    """Write what a build is like; says where."""
    path, data = folder / f"{name.replace(' ', '-')}.json", {"builds": {}, **facts}
    for other in folder.glob("*.json"):
        known = json.loads(other.read_text())
        if {key: known[key] for key in facts} == facts:
            path, data = other, known
    builds = {**data["builds"], name: version}
    data["builds"] = {name: builds[name] for name in sorted(builds, key=abi.numbers)}
    text = re.sub(r'\[\s+("[^"]*"),\s+("[^"]*")\s+\]', r"[\1, \2]", json.dumps(data, indent=1))
    path.write_text(f"{text}\n")
    return f"{name}: {' '.join(version).strip()}, in {path.name}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, nargs="+")
    for source in parser.parse_args().source:
        with tempfile.TemporaryDirectory() as folder:
            try:
                name, root = unpack(source, Path(folder))
                print(add(name, versions(root), describe(root), FOLDER))
            except NotDescribed as error:
                sys.exit(f"{source}: {error}")


if __name__ == "__main__":
    main()
