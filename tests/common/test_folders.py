"""Where notes and compiled code go if home cannot be written, and what is done where nothing can be."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from numba.core.caching import NullCache

from flashmoe.common import files, kept
from flashmoe.errors import FlashMoEError, FlashMoEWarning


@pytest.fixture
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files; the cache's own cannot be made, as on a read-only system, also by root."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(files, "temporary_folders", lambda: iter([tmp_path]))
    files._instead_of.cache_clear()
    yield tmp_path
    files._instead_of.cache_clear()


def test_a_temporary_folder_takes_the_place_of_the_cache(no_home: Path) -> None:
    with pytest.warns(FlashMoEWarning, match="cannot be written.*XDG_CACHE_HOME"):
        folder = files.cache_folder()
    assert folder == no_home / f"flashmoe-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert files.cache_folder() == folder  # said once
    assert not files.cache_is_kept()


@pytest.mark.parametrize("how", ["others may write", "a link"])
def test_a_folder_that_another_may_have_filled_is_not_used(no_home: Path, how: str) -> None:
    own = no_home / f"flashmoe-{os.getuid()}"
    if how == "a link":
        (no_home / "elsewhere").mkdir()
        own.symlink_to(no_home / "elsewhere")
    else:
        own.mkdir()
        own.chmod(0o777)
    with pytest.warns(FlashMoEWarning, match="each start compiles"):
        assert files.cache_folder() == no_home / "file/flashmoe"


def test_no_home_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert files.state_folder() == Path("/.local/state/flashmoe")


def test_relative_folders_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert files.state_folder() == Path.home() / ".local/state/flashmoe"


def test_a_socket_has_a_short_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("a" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    folder = files.make_socket_folder("http.sock")
    assert len(str(folder / "http.sock")) < 108
    folder.rmdir()
    monkeypatch.setattr(files, "temporary_folders", lambda: iter([long]))
    with pytest.raises(FlashMoEError, match="TMPDIR"):
        files.make_socket_folder("http.sock")


def test_compiled_code_goes_to_the_cache_folder(no_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept._Place, "_locator_classes", (kept._InCacheFolder,))

    def double(x: Any) -> Any:
        return x + x

    with pytest.warns(FlashMoEWarning):
        made = kept.kept()(double)
    assert made(2) == 4
    assert list((no_home / f"flashmoe-{os.getuid()}/compiled").rglob("*.nbc"))


def test_compiled_code_that_cannot_be_kept_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept._Place, "_locator_classes", ())

    def triple(x: Any) -> Any:
        return x + x + x

    made = kept.kept()(triple)
    assert isinstance(made._cache, NullCache)
    assert made(2) == 6


def test_a_link_stays_one_when_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("folder/file")
    for data in (b"first", b"second"):
        files.write_atomically(tmp_path / "link", data)
        assert (tmp_path / "folder/file").read_bytes() == data
    assert (tmp_path / "link").is_symlink()


def test_pipes_and_devices_are_written_to(tmp_path: Path) -> None:
    """Root could put a file in their place: /dev/null would be one."""
    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write_atomically(tmp_path / "pipe", b"report")
    assert os.read(end, 10) == b"report"
    os.close(end)
    assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)
