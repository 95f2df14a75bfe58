"""Layouts of known builds, and how they are derived from headers."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from flashmoe.engines.llamacpp import abi

ROOT = Path(__file__).parents[2]
LATEST = max(abi.FOLDER.glob("*.json"), key=lambda path: abi.numbers(path.stem))
#: Types in C, as a data file names them.
IN_C = {
    "ptr": "void *", "bool": "bool ", "char": "char ", "i8": "int8_t ", "i32": "int32_t ", "u32": "uint32_t ",
    "i64": "int64_t ", "size": "size_t ", "f32": "float ", "i8*": "int8_t *", "i32*": "int32_t *",
    "i32**": "int32_t **", "f32*": "const float *", "char*": "const char *",
}  # fmt: skip


def test_code_counts_on_what_all_builds_share() -> None:
    for ours in (abi.Batch, abi.BufferInterface, abi.BufferOverride, abi.InitParams, abi.Tensor.__base__):
        assert {layout.structs[ours.__name__] for layout in abi.LAYOUTS} == {ours}
    own = ("GGML_TYPE_COUNT", "LLAMA_LOAD_MODE_MMAP", "LLAMA_LOAD_MODE_NONE")
    shared = {name: value for name, value in abi.CONSTANTS.items() if name not in own}
    assert shared
    for layout in abi.LAYOUTS:
        assert shared.items() <= layout.constants.items()


def test_latest_layout_is_tried_first() -> None:
    assert abi.LAYOUTS[0].builds.keys() == json.loads(LATEST.read_text())["builds"].keys()


def test_builds_in_words() -> None:
    assert re.fullmatch(
        r"llama-cpp-python 0\.3\.30 to 0\.3\.\d+, xllamacpp 2026\.7\.9873 to [\d.]+", abi.known_builds()
    )


def test_file_is_mapped_or_not_in_every_build() -> None:
    for layout in abi.LAYOUTS:
        params = layout.structs["llama_model_params"]()
        states = []
        for wanted in (True, False):
            layout.map_file(params, wanted)
            states.append(bytes(params))
        assert states[0] != states[1] == bytes(len(states[1]))


@pytest.fixture(scope="module")
def script() -> Any:
    pytest.importorskip("clang.cindex")
    spec = importlib.util.spec_from_file_location("describe_build", ROOT / "scripts/describe_build.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def declaration(name: str, kind: str) -> str:
    if array := re.fullmatch(r"(.*)\[(\d+)\]", kind):
        return declaration(f"{name}[{array[2]}]", array[1])
    return IN_C.get(kind, f"struct {kind} ") + name


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder like llama.cpp's, whose headers declare what the latest data file says."""
    data = json.loads(LATEST.read_text())
    structs = "\n".join(
        f"struct {name} {{ {' '.join(f'{declaration(f, kind)};' for f, kind in fields.items())} }};"
        for name, fields in data["structs"].items()
    )
    macro = "LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY"
    numbers = ", ".join(f"{name} = {value}" for name, value in data["constants"].items() if name != macro)
    headers = {
        "include/llama.h": f"#include <stddef.h>\n#include <stdint.h>\n#include <stdbool.h>\n{structs}\n"
        f"enum numbers {{ {numbers} }};\n#define {macro} {data['constants'][macro]}\n"
        "int32_t llama_decode(struct llama_context * ctx, struct llama_batch batch);\n",
        "ggml/include/ggml-cpu.h": "",
        "ggml/src/ggml-backend-impl.h": "",
        "CMakeLists.txt": "".join(
            f"set(LLAMA_VERSION_{p} {n})\n" for p, n in (("MAJOR", 1), ("MINOR", 2), ("PATCH", 3))
        ),
        "ggml/CMakeLists.txt": "".join(f"set(GGML_VERSION_{p} 7)\n" for p in ("MAJOR", "MINOR", "PATCH")),
    }
    for name, text in headers.items():
        path = tmp_path / "llama.cpp" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "llama.cpp"


def test_headers_give_the_data_file(script: Any, checkout: Path, tmp_path: Path) -> None:
    data = json.loads(LATEST.read_text())
    facts = script.describe(checkout)
    assert facts == {key: data[key] for key in ("structs", "constants")}
    assert {name: list(fields) for name, fields in facts["structs"].items()} == {
        name: list(fields) for name, fields in data["structs"].items()
    }
    assert script.versions(checkout) == ["1.2.3", "7.7.7"]

    folder = tmp_path / "builds"
    folder.mkdir()
    (folder / LATEST.name).write_text(LATEST.read_text())
    script.add("xllamacpp 2099.1", ["1.2.3", "7.7.7"], facts, folder)  # laid out as the latest known
    facts["structs"]["llama_batch"]["new"] = "ptr"
    script.add("xllamacpp 2099.2", ["1.2.3", "7.7.8"], facts, folder)  # in a way of its own
    newest, latest = abi.read_layouts(folder)
    assert newest.builds == {"xllamacpp 2099.2": ("1.2.3", "7.7.8")}
    assert latest.builds == abi.LAYOUTS[0].builds | {"xllamacpp 2099.1": ("1.2.3", "7.7.7")}
    assert latest.structs == abi.LAYOUTS[0].structs


def test_source_archive(script: Any, checkout: Path, tmp_path: Path) -> None:
    archive = tmp_path / "llama_cpp_python-0.9.1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(checkout, "llama_cpp_python-0.9.1/vendor/llama.cpp")
    name, root = script.unpack(archive, tmp_path / "unpacked")
    assert (name, script.versions(root)) == ("llama-cpp-python 0.9.1", ["1.2.3", "7.7.7"])
    assert script.describe(root) == script.describe(checkout)
    assert script.unpack(checkout, tmp_path) == ("llama.cpp 1.2.3", checkout)
    (checkout / "ggml/src/ggml-backend-impl.h").unlink()
    with pytest.raises(script.NotDescribed, match=r"has no ggml/src/ggml-backend-impl\.h"):
        script.unpack(checkout, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("int32_t n_gpu_layers", "int32_t n_gpu_layers : 8", "bit fields in llama_model_params"),
        ("struct ggml_tensor {", "struct other {", "has no struct ggml_tensor"),
        ("int32_t n_gpu_layers", "long double n_gpu_layers", "no name for: long double"),
        ("GGML_TYPE_I32 =", "GGML_TYPE_OTHER =", "has no GGML_TYPE_I32"),
        ("struct ggml_tensor {", "struct __attribute__((packed)) ggml_tensor {", "aligns ggml_tensor in a way"),
        ("ctx, struct llama_batch batch", "ctx, struct llama_batch * batch", "declares llama_decode as"),
        ("int32_t llama_decode", "void llama_decode", "declares llama_decode as"),
        ("struct ggml_tensor {", "#error \"no\"\nstruct ggml_tensor {", "no"),
    ],
)  # fmt: skip
def test_build_that_cannot_be_described(script: Any, checkout: Path, old: str, new: str, why: str) -> None:
    header = checkout / "include/llama.h"
    text = header.read_text()
    assert old in text
    header.write_text(text.replace(old, new))
    with pytest.raises(script.NotDescribed, match=why):
        script.describe(checkout)
