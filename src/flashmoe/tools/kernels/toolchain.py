"""What kernels are compiled with: the system's compiler and CMake, or those that PyPI has (ziglang, cmake, ninja)."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from flashmoe.errors import FlashMoEError

_COMPILERS = (("gcc", "g++"), ("clang", "clang++"), ("cc", "c++"))


@dataclass(frozen=True)
class Toolchain:
    """compiler: for people, "g++ 12.2.0". c, cxx: commands, with their first arguments. cmake, make: paths."""

    compiler: str
    c: tuple[str, ...]
    cxx: tuple[str, ...]
    cmake: str
    make: str

    @property
    def generator(self) -> str:
        """CMake's name for `make`."""
        return "Ninja" if Path(self.make).name.startswith("ninja") else "Unix Makefiles"


def find_toolchain() -> Toolchain:
    """The system's tools, and in place of those that it lacks the ones of `flashmoe[kernels]`. Raises FlashMoEError."""
    compiler = next((both for both in map(_both, _COMPILERS) if all(both)), None)
    c: tuple[str, ...] = compiler[:1] if compiler else ()
    cxx: tuple[str, ...] = compiler[1:] if compiler else ()
    zig = _zig()
    if not cxx and zig:
        c, cxx = (zig, "cc"), (zig, "c++")
    cmake, make = _program("cmake"), _program("ninja") or _program("make")
    if not (cxx and cmake and make):
        wanted = {"C++ compiler": cxx, "cmake": cmake, "ninja": make}
        missing = [f"no {name}" for name, there in wanted.items() if not there]
        raise FlashMoEError(
            f"{', '.join(missing)} here: "
            "pip install 'flashmoe-ssd[kernels]', or install g++ and cmake with the system's packages"
        )
    return Toolchain(_named(cxx), c, cxx, cmake, make)


def _both(names: tuple[str, str]) -> tuple[str, str]:
    return shutil.which(names[0]) or "", shutil.which(names[1]) or ""


def _program(name: str) -> str:
    """A program of the system's, or of a package beside this one."""
    scripts = sysconfig.get_path("scripts")
    return shutil.which(name) or shutil.which(name, path=scripts) or ""


def _zig() -> str:
    """The compiler in the package ziglang."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or not spec.submodule_search_locations:
        return ""
    zig = Path(spec.submodule_search_locations[0]) / "zig"
    return str(zig) if os.access(zig, os.X_OK) else ""


def _named(cxx: tuple[str, ...]) -> str:
    """A compiler's name and version, for people."""
    version = subprocess.run([*cxx, "--version"], capture_output=True, text=True).stdout
    number = re.search(r"\d+\.\d+(\.\d+)?", version)
    name = "zig c++" if len(cxx) > 1 else Path(cxx[0]).name
    return (
        f"{name}, clang {number[0]}"
        if number and len(cxx) > 1
        else f"{name} {number[0] if number else ''}".strip()
    )
