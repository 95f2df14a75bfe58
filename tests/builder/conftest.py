"""A user's cache folder of each test's own, and source archives that are compiled in a second."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from flashmoe.engines.llamacpp import kernels
from flashmoe.tools.kernels.source import archive_name

Make = Callable[..., Path]

#: What a module of kernels has to have, and does when it is loaded.
MODULE = """
#include <signal.h>
#include <stdlib.h>
void *ggml_backend_init(void) {{ {body} return NULL; }}
"""
TREE = """
cmake_minimum_required(VERSION 3.14)
project(ggml C CXX)
add_library(ggml-base SHARED base.c)
set_target_properties(ggml-base PROPERTIES VERSION 0.1 SOVERSION 0)
"""
VARIANT = """
add_library(ggml-cpu-{name}-feats OBJECT {name}-feats.cpp)
set_target_properties(ggml-cpu-{name}-feats PROPERTIES POSITION_INDEPENDENT_CODE ON)
add_library(ggml-cpu-{name} MODULE {name}.c)
target_link_libraries(ggml-cpu-{name} PRIVATE ggml-base ggml-cpu-{name}-feats)
"""
SCORE = 'extern "C" int ggml_backend_score() {{ return {score}; }}\n'


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this wheel and processor, not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return kernels.folder()


@pytest.fixture
def source(tmp_path: Path) -> Make:
    """source({"name": (score, C of its start)}): an archive like the wheel's, with variants that are no kernels."""

    def make(variants: Mapping[str, tuple[int, str]], more: str = "", version: str = "") -> Path:
        version = version or kernels.wheel_version()
        files = {"CMakeLists.txt": TREE + "".join(VARIANT.format(name=name) for name in variants) + more}
        files["base.c"] = "int base;\n"
        for name, (score, body) in variants.items():
            files[f"{name}-feats.cpp"] = SCORE.format(score=score)
            files[f"{name}.c"] = MODULE.format(body=body)
        path = tmp_path / archive_name(version)
        with tarfile.open(path, "w:gz") as tar:
            for name, text in files.items():
                member = tarfile.TarInfo(f"xllamacpp-{version}/thirdparty/llama.cpp/ggml/{name}")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
        return path

    return make
