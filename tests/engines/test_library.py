"""Libraries that cannot be used are refused with a reason, before anything can crash."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashmoe.engines.llamacpp import abi, facts, tested
from flashmoe.engines.llamacpp.facts import differences
from flashmoe.engines.llamacpp.library import ENVIRONMENT, Library, find_library
from flashmoe.engines.llamacpp.tested import Proof, prove, self_test
from flashmoe.errors import FlashMoEWarning, LibraryError
from flashmoe.runtime.layout import PLAIN, REPACKED
from flashmoe.storage import disk, gguf
from flashmoe.tools import self_test as module
from tests.cli.runner import flashmoe


def other_layout(lib: Library) -> abi.Layout:
    """That of a build whose structures differ from the library's."""
    return next(layout for layout in abi.LAYOUTS if layout != lib.build.layout)


def test_installed_library_is_found_and_known(lib: Library) -> None:
    assert find_library().is_file()
    assert lib.build.known
    assert lib.build.name in lib.build.layout.builds
    assert not differences(lib, lib.build.layout)


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


def named(layout: abi.Layout, builds: dict[str, abi.Version]) -> abi.Layout:
    return replace(layout, builds=builds)


def test_unknown_version_of_a_known_layout_is_used_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, lib: Library, tmp_path: Path, notes: Path
) -> None:
    older = [named(layout, {"an older one": ("0.0.1", "0.0.1")}) for layout in abi.LAYOUTS]
    monkeypatch.setattr(abi, "LAYOUTS", older)
    path = tmp_path / "libllama.so"
    path.symlink_to(lib.path)
    monkeypatch.setenv(ENVIRONMENT, str(path))
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 0, "plain\nrepacked\n", ""),
    )
    with pytest.warns(
        FlashMoEWarning, match=r"llama\.cpp .*\(ggml .*\) is not a build that FlashMoE knows, but"
    ):
        found = tested.tested_library()
    assert (found.build.layout.structs, found.build.known) == (lib.structs, False)
    assert lib.ggml_version().decode() in found.build.name


def test_version_of_two_builds_is_read_by_the_layout_that_fits(
    monkeypatch: pytest.MonkeyPatch, lib: Library
) -> None:
    version = lib.build.layout.builds[lib.build.name]
    others = [named(layout, {"other": version}) for layout in abi.LAYOUTS if layout != lib.build.layout]
    monkeypatch.setattr(abi, "LAYOUTS", [*others, named(lib.build.layout, {"this": version})])
    found = Library(lib.path).build
    assert (found.name, found.layout.structs, found.known) == ("this", lib.structs, True)


def test_a_library_that_is_opened_twice(lib: Library, demo: Path) -> None:
    """The process has one log, whose last listener may be gone."""
    Library(lib.path)
    gc.collect()
    called: list[Any] = []
    others = [
        abi.LOG_CALLBACK(lambda *told: called.append(told)) for _ in range(100)
    ]  # in its place in memory
    assert not lib.ggml_backend_load(os.fsencode(demo))
    assert others
    assert not called
    with pytest.raises(LibraryError, match=r"ELF header"):
        lib.exchange_kernels(demo)


def test_library_of_no_known_layout(monkeypatch: pytest.MonkeyPatch, lib: Library) -> None:
    known = abi.known_builds()
    monkeypatch.setattr(abi, "LAYOUTS", [layout for layout in abi.LAYOUTS if layout != lib.build.layout])
    monkeypatch.setattr(abi, "known_builds", lambda: known)
    with pytest.raises(LibraryError, match="is not a build that FlashMoE knows, and differs from") as caught:
        Library(lib.path)
    assert f"(ggml {lib.ggml_version().decode()})" in str(caught.value)
    assert f"install one of {known}" in str(caught.value)


def shifted(struct: Any) -> Any:
    """A struct with a field more, at its beginning."""
    return type(
        struct.__name__, (ctypes.Structure,), {"_fields_": [("new", ctypes.c_uint64), *struct._fields_]}
    )


@pytest.mark.parametrize(
    "name",
    ["llama_context_params", "llama_model_params", "ggml_threadpool_params", "ggml_backend_buffer_type"],
)
def test_wrong_layout_is_noticed(name: str, lib: Library) -> None:
    structs = {**lib.structs, name: shifted(lib.structs[name])}
    assert differences(lib, replace(lib.build.layout, structs=structs)) == [name]


def test_layout_of_another_build_is_noticed(lib: Library) -> None:
    assert differences(lib, other_layout(lib))


@pytest.mark.parametrize(
    ("name", "struct"), [("ggml_tensor", "Tensor"), ("ggml_backend_buffer_i", "BufferInterface")]
)
def test_wrong_layout_of_what_builds_share_is_noticed(
    name: str, struct: str, lib: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, struct, shifted(getattr(abi, struct)))
    assert name in differences(lib, lib.build.layout)


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
        return subprocess.CompletedProcess(command, 0, "plain\nrepacked\n", "")

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


def test_no_room_for_the_probe(notes: Path, lib: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """No fault of the library's: files can have a KiB here."""
    command = f"ulimit -f 1; exec {sys.executable} -B -m flashmoe.tools.self_test {lib.path}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1][-14:]) == (tested.NOT_TESTED, "File too large")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(LibraryError, match="no room for that .*File too large.*TMPDIR"):
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
        return subprocess.CompletedProcess(command, 0, "plain\nrepacked\n", "")

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


def test_kernels_with_amx_are_not_used_with_repacked_weights(
    lib: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever else passes: no model of the self-test's has the weights that they crash on."""
    monkeypatch.setattr(module, "compare", lambda *_: True)
    module.run(lib, None, tmp_path)
    assert capsys.readouterr().out.split() == [PLAIN, REPACKED]
    monkeypatch.setattr(Library, "features", [*lib.features, "AMX_INT8"])
    with pytest.raises(module.Failed, match="AMX"):
        module.run(lib, None, tmp_path)
    assert capsys.readouterr().out.split() == [PLAIN]


@pytest.mark.parametrize(
    ("status", "stdout", "proof"),
    [
        (-4, "", Proof(False, False, "ended by SIGILL")),
        (-4, "plain\n", Proof(True, False, "ended by SIGILL")),
        (-4, "plain\nrepacked\n", Proof(False, False, "ended by SIGILL")),
        (0, "", Proof(False, False, "ended before its time")),
        (0, "said by a module\nplain\nrepacked\n", Proof(True, True)),
    ],
)
def test_a_crash_counts_for_the_layout_that_it_happened_in(
    status: int, stdout: str, proof: Proof, notes: Path, lib: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, status, stdout, "")
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
