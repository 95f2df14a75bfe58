"""`flashmoe engine build` and `add`: what is tried, what becomes of kernels that crash, what a stopped build leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from flashmoe.engines.llamacpp import kernels, library
from flashmoe.engines.llamacpp.kernels import BUILT_IN, Choice
from flashmoe.engines.llamacpp.tested import Proof
from flashmoe.errors import FlashMoEError
from flashmoe.tools.kernels import build as module
from flashmoe.tools.kernels.toolchain import find_toolchain
from flashmoe.tools.kernels.trial import Trial, score
from tests.builder.conftest import Make
from tests.cli.runner import COMMAND, flashmoe
from tests.cli.test_json import check as check_names


@pytest.fixture
def compiler() -> None:
    try:
        find_toolchain()
    except FlashMoEError as error:
        pytest.skip(str(error))


def left(home: Path) -> list[str]:
    """What lies in the folder of this wheel and processor beside its lock."""
    return sorted(path.name for path in home.iterdir() if path.name != "lock") if home.exists() else []


def test_kernels_that_die_are_named_and_not_kept(home: Path, source: Make, compiler: None) -> None:
    archive = source(
        {
            "slow": (1, ""),
            "fast": (9, "raise(SIGILL);"),
            "none": (0, "raise(SIGSEGV);"),
            "middle": (5, "raise(SIGSEGV);"),
            "leaves": (3, "exit(0);"),
        }
    )
    done = flashmoe("engine", "build", archive, "--json", "-")
    assert done.status == 0, done.err
    report = json.loads(done.out)
    check_names(report)
    assert report["compiler"]
    tried = [(trial["name"], trial["plain"], trial["failure"]) for trial in report["tried"]]
    assert tried[:3] == [
        ("fast", False, "ended by SIGILL"),
        ("middle", False, "ended by SIGSEGV"),
        ("leaves", False, "ended before its time"),
    ]
    assert tried[3][:2] == ("slow", False)  # ggml gets no backend of it
    assert "not a module that this llama.cpp can use" in tried[3][2]
    assert "fast does not work here (ended by SIGILL)" in done.err
    assert report["in_use"] == BUILT_IN
    assert kernels.choice() == Choice(BUILT_IN, chosen=True)
    assert left(home) == ["in-use.json"]


def test_a_compiler_that_fails(home: Path, source: Make, compiler: None) -> None:
    failed = flashmoe("engine", "build", source({"a": (1, "this is no C;")}))
    assert failed.status == 1
    assert "a with " in failed.message
    assert "error" in failed.message
    assert left(home) == []
    unconfigured = flashmoe("engine", "build", source({}, more='message(FATAL_ERROR "not on this system")'))
    assert "not on this system" in unconfigured.message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_build_leaves_nothing(
    number: signal.Signals, home: Path, source: Make, compiler: None, tmp_path: Path
) -> None:
    """Neither files nor a compiler at work; of a killed one, what the next one removes."""
    mark = tmp_path / "compiling"
    archive = source(
        {"a": (1, "")},
        more=f"""
add_custom_command(OUTPUT never.c COMMAND sh -c "echo $$ >{mark}; exec sleep 600" VERBATIM)
add_custom_target(never DEPENDS never.c)
add_dependencies(ggml-cpu-a never)
""",
    )
    child = subprocess.Popen(
        [*COMMAND, "engine", "build", str(archive)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    for _ in range(2000):
        if mark.exists() and mark.read_text().strip():
            break
        assert child.poll() is None, child.communicate()
        time.sleep(0.1)
    compiling = int(mark.read_text())
    tools = os.getsid(compiling)
    child.send_signal(number)
    child.communicate(timeout=60)
    if number == signal.SIGKILL:
        os.kill(
            compiling, signal.SIGKILL
        )  # it would be ten minutes before the tools look whether anyone reads them
        assert ended(tools)
        assert [name.startswith(".part-") for name in left(home)] == [True]
        with module._workshop() as shop:
            assert left(home) == [shop.name]
    else:
        assert child.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
        assert ended(tools)
    assert left(home) == []
    assert kernels.choice() == Choice()


def ended(session: int) -> bool:
    """Whether all processes of a session are gone, or will never run again."""
    for _ in range(600):
        if not any(state != "Z" for state in states(session)):
            return True
        time.sleep(0.1)
    return False


def states(session: int) -> Iterator[str]:
    """Of the processes of a session: R, S, Z, ..."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, _, _, its, *_ = path.read_text().rpartition(")")[2].split()
            if int(its) == session:
                yield state


def test_one_build_at_a_time(home: Path) -> None:
    with module._workshop(), pytest.raises(FlashMoEError, match="by another process"), module._workshop():
        pass


def test_a_folder_that_cannot_be_written(home: Path) -> None:
    home.parent.mkdir(parents=True)
    home.touch()
    with pytest.raises(FlashMoEError, match="cannot be written"), module._workshop():
        pass
    assert "cannot be written" in flashmoe("engine", "use", BUILT_IN).message


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("flashmoe.tools.kernels.toolchain._zig", lambda: "")
    monkeypatch.setattr("sysconfig.get_path", lambda _: "/nowhere")
    with pytest.raises(
        FlashMoEError, match=r"no C\+\+ compiler, no cmake, no ninja here: pip install 'flashmoe-ssd"
    ):
        find_toolchain()


def test_other_libraries_have_kernels_of_their_own(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "libllama.so"
    other.touch()
    monkeypatch.setenv(library.ENVIRONMENT, str(other))
    refused = flashmoe("engine", "build")
    assert refused.status == 2
    assert "only xllamacpp's library takes kernels from elsewhere" in refused.message


def test_files_that_are_no_modules(home: Path, tmp_path: Path, lib: library.Library) -> None:
    file = tmp_path / "libggml-cpu-x.so"
    assert "no such file" in flashmoe("engine", "add", file).message
    file.write_bytes(b"no module")
    assert "has no kernels that this processor can run" in flashmoe("engine", "add", file).message
    archive = shutil.make_archive(str(tmp_path / "package"), "gztar", tmp_path, file.name)
    assert "has no kernels that this processor can run" in flashmoe("engine", "add", archive).message
    file.write_text(" ".join(map(str, range(1 << 16))))
    whole = Path(shutil.make_archive(str(tmp_path / "package"), "gztar", tmp_path, file.name)).read_bytes()
    for damaged in (whole[:-30], whole[: len(whole) // 2] + bytes(9) + whole[len(whole) // 2 + 9 :]):
        Path(archive).write_bytes(damaged)
        assert "cannot be unpacked" in flashmoe("engine", "add", archive).message
    assert left(home) == []


@pytest.mark.parametrize(
    ("new", "old", "used"),
    [
        (1.5, None, "new"),
        (1.02, None, BUILT_IN),
        (1.5, 1.2, "new"),
        (1.2, 1.5, "old"),
        (1.02, 1.01, BUILT_IN),
    ],
)
def test_the_fastest_are_used(
    new: float, old: float | None, used: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that are there, those that are new, and the built-in ones, whichever was measured last."""

    def made(name: str) -> Path:
        module_file = home / f".part-{name}" / f"libggml-cpu-{name}.so"
        module_file.parent.mkdir(parents=True)
        module_file.touch()
        return module_file

    def timed(_: Path, trials: list[Trial]) -> list[Trial]:
        ratios = {"new": new, "old": old or 0.0}
        return [replace(t, decode_ratio=ratios[t.name], prompt_ratio=ratios[t.name]) for t in trials]

    if old:
        path = made("old")
        facts = {"source": "a test", "decode_ratio": old, "prompt_ratio": old}
        kernels.keep(path.parent, path.name, {"name": "old", **facts})
        kernels.use("old")
    works = Proof(True, True)
    monkeypatch.setattr(module, "prove", lambda *_: works)
    monkeypatch.setattr(module, "self_test", lambda *_: works)
    monkeypatch.setattr(module, "timed", timed)
    result = module._keep_fastest(tmp_path, [made("new")], "a test", "", lambda *_: None)
    assert kernels.choice() == Choice(used, chosen=True)
    assert (result.in_use.name if result.in_use else BUILT_IN) == used
    assert [trial.name for trial in result.tried] == ["new"]
    assert result.sentence().startswith("new in use" if used == "new" else f"the {used} kernels stay in use")


def test_names_that_mean_something_else(home: Path, tmp_path: Path) -> None:
    for name in ("built-in", ".hidden", "a b"):
        file = tmp_path / f"libggml-cpu-{name}.so"
        file.write_bytes(b"no module")
        assert "is called libggml-cpu-NAME.so" in flashmoe("engine", "add", file).message
    assert left(home) == []


def test_files_that_do_not_work_decide_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "score", lambda _: 1)
    monkeypatch.setattr(module, "prove", lambda *_: Proof(False, False, "ended by SIGILL"))
    file = tmp_path / "libggml-cpu-x.so"
    file.touch()
    assert "x does not work (ended by SIGILL)" in flashmoe("engine", "add", file).message
    assert left(home) == []


def test_check_without_any(home: Path) -> None:
    done = flashmoe("engine", "check")
    assert (done.status, "`flashmoe engine build` makes some" in done.out) == (0, True)


def test_a_crash_gives_no_score(tmp_path: Path, compiler: None) -> None:
    tools = find_toolchain()
    for name, code, expected in (
        ("good", "int ggml_backend_score(void) { return 7; }", 7),
        ("none", "int x;", 1),
        ("dies", "int ggml_backend_score(void) { return *(volatile int *)0; }", 0),
        ("leaves", "#include <stdlib.h>\nint ggml_backend_score(void) { exit(0); }", 0),
        (
            "says",
            '#include <stdio.h>\nint ggml_backend_score(void) { puts("hello"); fflush(stdout); return 5; }',
            5,
        ),
    ):
        (tmp_path / f"{name}.c").write_text(code)
        made = tmp_path / f"{name}.so"
        subprocess.run([*tools.c, "-shared", "-fPIC", "-o", made, tmp_path / f"{name}.c"], check=True)
        assert score(made) == expected, name
