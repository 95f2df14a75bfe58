"""Opening a model fails at any step: everything that was opened is closed."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import flashmoe
from flashmoe.common.memory import status_bytes
from flashmoe.engines.llamacpp.library import Library
from tests.conftest import Tiny

PACKAGE = str(Path(flashmoe.__file__).parent)
#: What makes something of the library's that has to be freed, and what frees it.
PAIRS = {
    "llama_model_load_from_file_ptr": "llama_model_free",
    "llama_init_from_model": "llama_free",
    "ggml_backend_buft_alloc_buffer": "ggml_backend_buffer_free",
    "ggml_threadpool_new": "ggml_threadpool_free",
}


class Planned(Exception):
    """What a step raises here."""


@contextmanager
def profile(function: Callable[[FrameType], object]) -> Iterator[None]:
    """Let `function` see the frame of every call."""

    def called(frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call":
            function(frame)

    sys.settrace(called)
    try:
        yield
    finally:
        sys.settrace(None)


def is_own(frame: FrameType) -> bool:
    """Whether it is a call of the package's code; not what the library calls back itself."""
    by = frame.f_back.f_code.co_filename if frame.f_back else ""
    return frame.f_code.co_filename.startswith(PACKAGE) and by != __file__


def steps_of(opening: Any) -> list[CodeType]:
    """The package's functions that are called, each once, in order; of those that hold something or open it."""
    steps: dict[CodeType, None] = {}
    with profile(lambda frame: is_own(frame) and steps.setdefault(frame.f_code)):
        model = opening()
    model.close()
    opens = tuple(f"{PACKAGE}/{folder}/" for folder in ("runtime", "engines", "storage", "cache"))
    return [step for step in steps if step.co_filename.startswith(opens) and step.co_name != "close"]


def fail(opening: Any, step: CodeType) -> bool:
    """Open, and let a step raise when it is first called; whether that was the end of it."""

    def called(frame: FrameType) -> None:
        if frame.f_code is step and is_own(frame):
            raise Planned  # which ends the profile, too

    try:
        with profile(called):
            model = opening()
    except Planned:
        return True
    except flashmoe.FlashMoEError:  # what became of it
        return True
    model.close()
    return False


def descriptors() -> Counter[str]:
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found[os.readlink(f"/proc/self/fd/{name}")] += 1
    return found


@pytest.fixture
def alive(lib: Library, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many of each kind the library has made and not freed."""
    count: Counter[str] = Counter()

    def counted(name: str, kind: str, by: int) -> Any:
        function = getattr(lib, name)

        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            if by < 0 or result:
                count[kind] += by
            return result

        return call

    for make, free in PAIRS.items():
        monkeypatch.setattr(lib, make, counted(make, make, 1))
        monkeypatch.setattr(lib, free, counted(free, make, -1))
    # the profile is of this thread
    monkeypatch.setattr(importlib.import_module("flashmoe.runtime.load"), "run_apart", lambda f, _: f())
    return count


@pytest.mark.filterwarnings("ignore")  # what is raised in a callback of C code is reported as ignored
def test_every_step_fails_once(tiny: Tiny, lib: Library, tmp_path: Path, alive: Counter[str]) -> None:
    path = tiny("gpt-oss")

    def opening() -> flashmoe.Model:
        return flashmoe.load(
            path,
            library=lib,
            threads=1,
            ram=status_bytes("VmHWM") + (1 << 30),  # of this process, whatever it has done before
            layout="repacked",
            prefetch="table",
            parallel=0,
            save_cache=tmp_path / "saved",
            trace=True,
        )

    opening().close()  # compiles, and measures the drive
    steps = steps_of(opening)
    assert len(steps) > 100
    gc.collect()
    before, ended = descriptors(), 0
    assert not +alive
    for step in steps:
        ended += fail(opening, step)
        assert not +alive, step
    gc.collect()
    assert ended > len(steps) * 0.8
    assert descriptors() == before
    opening().close()
