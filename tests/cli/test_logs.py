"""--verbose: what fell back, was retried or was warned of, on stderr; without it nothing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from flashmoe.engines.llamacpp.library import Library
from tests.cli.runner import flashmoe
from tests.server.process import serving

RUN = ("run", "demo", "-p", "hello world", "-n", 2, "-t", 1, "--cache", "12%")


@pytest.fixture
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without direct reads."""
    monkeypatch.setattr("os.O_DIRECT", 0)


@pytest.mark.usefixtures("own_home", "buffered")
def test_verbose_says_what_fell_back() -> None:
    loud = flashmoe(*RUN, "-v")
    assert "WARNING flashmoe.storage.direct: " in loud.err
    assert "INFO flashmoe.runtime.layout: layout plain: " in loud.err
    assert "WARNING flashmoe.llama.cpp: " in loud.err
    assert "has passed the self-test" in loud.err
    quiet = flashmoe(*RUN, "-v", "-q")
    assert "WARNING flashmoe.storage.direct: " in quiet.err
    assert "tokens/s" not in quiet.err


@pytest.mark.usefixtures("buffered")
def test_without_verbose_nothing_is_said_even_after_a_verbose_command() -> None:
    flashmoe(*RUN, "-v")
    silent = flashmoe(*RUN)
    assert silent.status == 0
    assert "WARNING" not in silent.err
    assert "direct" not in silent.err
    assert flashmoe(*RUN, "-q").err == ""


def test_the_library_s_warnings_and_errors_are_forwarded(
    lib: Library, caplog: pytest.LogCaptureFixture
) -> None:
    """llama.cpp's own levels (2: info, 3: warning, 4: error, 5: goes on)."""
    lib.messages.clear()
    for level, text in (
        (2, b"known\n"),
        (5, b"more\n"),
        (3, b"odd\n"),
        (5, b"still odd"),
        (4, b"bad\n"),
        (4, None),
    ):
        lib._on_log(level, text, None)
    warning, error = logging.WARNING, logging.ERROR
    assert [(r.levelno, r.getMessage()) for r in caplog.records if r.name == "flashmoe.llama.cpp"] == [
        (warning, "odd"),
        (warning, "still odd"),
        (error, "bad"),
    ]
    assert lib.messages == ["bad"]


def test_a_verbose_server_starts_answers_and_ends(demo: Path) -> None:
    """Its library logs in threads of its own, also while its constructor holds Python's lock."""
    with serving(demo, "-v", "--cache", "50%") as server:
        answer = server.client().chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "hello"}], max_tokens=4
        )
        assert answer.choices[0].finish_reason
    assert any(line.startswith("WARNING flashmoe.llama.cpp: ") for line in server.messages)
