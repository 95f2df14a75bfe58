"""Libraries that cannot be used are refused with a reason, before anything can crash."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashmoe.engines.llamacpp import abi, library, tested
from flashmoe.engines.llamacpp.library import ENVIRONMENT, Library, find_library
from flashmoe.engines.llamacpp.tested import Proof, prove, self_test
from flashmoe.errors import LibraryError
from flashmoe.runtime.layout import PLAIN
from flashmoe.storage import disk, gguf
from flashmoe.tools import self_test as module
from tests.cli.runner import flashmoe


def other_build(lib: Library) -> abi.Build:
    """A known build whose structures differ from the library's."""
    return next(b for b in abi.KNOWN_BUILDS.values() if b.name != lib.build.name)


def test_installed_library_is_found_and_known(lib: Library) -> None:
    assert find_library().is_file()
    assert lib.build in abi.KNOWN_BUILDS.values()
    abi.self_check(lib, lib.build)


def test_named_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(find_library()))
    assert find_library() == Path(os.environ[ENVIRONMENT])
    (tmp_path / "libllama.so").write_bytes(b"")
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    assert find_library() == tmp_path / "libllama.so"


@pytest.mark.parametrize(
    ("wish", "turns"),
    [({}, "3000000"), ({"GOMP_SPINCOUNT": "17"}, "17"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_compute_threads_stay_awake(lib: Library, wish: dict[str, str], turns: str) -> None:
    if not lib.openmp:
        pytest.skip("this llama.cpp is built without OpenMP")
    code = "from flashmoe.engines.llamacpp import library; library.open_library(library.find_library())"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | wish | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this OpenMP is not GNU's")
    assert f"GOMP_SPINCOUNT = '{turns}'" in done.stderr


@pytest.mark.parametrize("what", ["nothing", "folder"])
def test_named_library_that_is_not_there(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named = tmp_path if what == "folder" else tmp_path / "none.so"
    monkeypatch.setenv(ENVIRONMENT, str(named))
    with pytest.raises(LibraryError, match=f"{ENVIRONMENT}={named}: no such library"):
        find_library()


def test_no_library_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(LibraryError, match="pip install xllamacpp, or set FLASHMOE_LIBLLAMA"):
        find_library()


def test_file_that_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / "libllama.so"
    for content in (b"", b"not a library", b"\x7fELF" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(LibraryError, match="cannot be loaded"):
            Library(path)


def test_library_of_something_else(tmp_path: Path) -> None:
    """A shared object that loads and has other functions."""
    from numpy.random import mtrand

    with pytest.raises(
        LibraryError, match="has no function llama_backend_init; it is not a llama.cpp library"
    ):
        Library(Path(mtrand.__file__))


def test_unknown_version_names_the_known_ones(monkeypatch: pytest.MonkeyPatch, lib: Library) -> None:
    known = {build.name: build for build in abi.KNOWN_BUILDS.values()}
    others = {(f"0.0.{i}", "0"): build for i, build in enumerate(known.values())}
    monkeypatch.setattr(abi, "KNOWN_BUILDS", others)
    with pytest.raises(LibraryError, match="is not a build that FlashMoE knows; install ") as caught:
        Library(lib.path)
    for name in known:
        assert name in str(caught.value)
    assert lib.llama_version().decode() in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("context_params", "llama_context_params"),
        ("shifted context_params", "llama_context_params"),
        ("tensor", "ggml_tensor"),
        ("buffer_type", "ggml_backend_buffer_type"),
        ("model_params", "llama_model_params"),
    ],
)
def test_wrong_layout_is_noticed(
    change: str, named: str, lib: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = lib.build
    if change == "context_params":
        build = abi.Build(build.name, other_build(lib).context_params, build.buffer_type)
    elif change == "shifted context_params":
        fields = [("new", ctypes.c_uint32), *build.context_params._fields_]
        build = abi.Build(build.name, type("P", (ctypes.Structure,), {"_fields_": fields}), build.buffer_type)
    elif change == "buffer_type":
        names = [name for name, _ in build.buffer_type._fields_[0][1]._fields_]
        wrong = abi._buffer_type(" ".join([names[0], "new", *names[1:]]))
        build = abi.Build(build.name, build.context_params, wrong)
    elif change == "tensor":
        monkeypatch.setattr(abi.C, "sizeof", lambda _: 360)
    else:
        fields = [("new", ctypes.c_uint64), *abi.ModelParams._fields_]
        params = type("M", (ctypes.Structure,), {"_fields_": fields})
        monkeypatch.setitem(
            library._PROTOTYPES,
            "llama_model_default_params",
            (params, library._PROTOTYPES["llama_backend_init"][1]),
        )
    with pytest.raises(LibraryError, match=f"differs from build .* in .*{named}"):
        abi.self_check(reopened(lib, build), build)


def reopened(lib: Library, build: abi.Build) -> Any:
    """The library through new declarations, without its checks."""
    fresh = Library.__new__(Library)
    fresh.path, fresh.build, fresh._handles = lib.path, build, [ctypes.CDLL(str(lib.path))]
    for name, (result, arguments) in library._PROTOTYPES.items():
        fresh._declare(name, result, *arguments)
    fresh._declare("llama_context_default_params", build.context_params)
    return fresh


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "flashmoe" / "libraries.json"


def test_probe_proves_the_installed_library_once(
    notes: Path, lib: Library, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert demo.is_file()
    self_test(lib.path)
    (fact,) = json.loads(notes.read_text())
    assert str(lib.path) in fact

    def again(*_: object, **__: object) -> None:
        raise AssertionError("tested again")

    monkeypatch.setattr(subprocess, "run", again)
    self_test(lib.path)


@pytest.mark.parametrize("content", ["", "{", "null", "{}", "\x00"])
def test_damaged_notes_mean_not_tested(
    content: str, notes: Path, lib: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes.parent.mkdir()
    notes.write_text(content)
    asked: list[list[str]] = []

    def child(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", child)
    self_test(lib.path)
    assert len(asked) == 1
    assert len(json.loads(notes.read_text())) == 1


@pytest.mark.parametrize(
    ("status", "stderr", "reason"),
    [
        (-11, "a warning", "ended by SIGSEGV"),
        (-6, "GGML_ASSERT failed", "GGML_ASSERT failed"),
        (-6, "", "ended by SIGABRT"),
        (-40, "", "ended by signal 40"),
        (1, "warning\nlogits differ from the stock engine's\n", "logits differ"),
        (1, "", "status 1"),
    ],
)
def test_library_that_fails_its_probe(
    status: int, stderr: str, reason: str, notes: Path, lib: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, status, "", stderr)
    )
    with pytest.raises(LibraryError, match=f"does not work with the slot pool .*{reason}"):
        self_test(lib.path)
    assert not notes.exists()


ILLEGAL = """
#include <signal.h>
__attribute__((constructor)) static void start(void) { raise(SIGILL); }
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")
@pytest.mark.parametrize("arguments", [("doctor",), ("plan", "demo"), ("run", "demo", "-p", "x")])
def test_a_library_for_another_processor(
    arguments: tuple[str, ...], notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first instruction ends a process: one of its own, and this one goes on."""
    (tmp_path / "ill.c").write_text(ILLEGAL)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libllama.so", tmp_path / "ill.c"], check=True)
    monkeypatch.setattr(disk, "_SECONDS", 0.001)
    result = flashmoe(*arguments, env={ENVIRONMENT: str(tmp_path)})
    assert result.status == 1
    assert "uses instructions that the processor" in result.out + result.err
    assert not notes.exists()


def test_another_processor_means_not_tested(
    notes: Path, lib: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home or a virtual machine that has moved."""
    asked: list[list[str]] = []

    def child(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", child)
    for instructions in ("avx2", "avx2", "avx"):
        monkeypatch.setattr(tested, "instructions", lambda name=instructions: name)
        self_test(lib.path)
    assert len(asked) == 2


def test_library_that_hangs_in_its_probe(notes: Path, lib: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(LibraryError, match="no answer"):
        self_test(lib.path)
    assert not notes.exists()


def test_probe_notices_other_logits(lib: Library, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.compare(lib, demo, PLAIN, "12%")
    decode, calls = module._decode, iter(range(10**6))

    def off_by_one(context: Any, tokens: list[int]) -> Any:
        logits = decode(context, tokens)
        if next(calls) == 3:
            logits[0] += 1
        return logits

    monkeypatch.setattr(module, "_decode", off_by_one)
    assert not module.compare(lib, demo, PLAIN, "12%")


@pytest.mark.parametrize(
    ("stdout", "proof"),
    [
        ("", Proof(False, False, "ended by SIGILL")),
        ("plain\n", Proof(True, False, "ended by SIGILL")),
        ("plain\nrepacked\n", Proof(False, False, "ended by SIGILL")),
    ],
)
def test_a_crash_counts_for_the_layout_that_it_happened_in(
    stdout: str, proof: Proof, notes: Path, lib: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, -4, stdout, "")
    )
    assert prove(lib.path) == proof


def test_types_are_those_of_the_library(lib: Library) -> None:
    """All that a file can hold, and no more: beyond them the library's own table ends."""
    name, block, size = (lib._find(f"ggml_{what}") for what in ("type_name", "blck_size", "type_size"))
    name.restype, block.restype, size.restype = ctypes.c_char_p, ctypes.c_int64, ctypes.c_size_t
    of_intermediates = "Q8_1"
    known = {
        number: (name(number).decode().upper(), block(number), size(number))
        for number in range(max(gguf.TYPES) + 1)
        if size(number)
    }
    assert {number: kind for number, kind in known.items() if kind[0] != of_intermediates} == gguf.TYPES
    following = name(max(gguf.TYPES) + 1)
    assert following is None or not following.isascii() or not following.decode().isidentifier()
