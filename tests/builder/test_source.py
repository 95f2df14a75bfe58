"""The wheel's source archive: found where pip would look, checked, and only ggml of it unpacked."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashmoe.engines.llamacpp import kernels
from flashmoe.errors import FlashMoEError
from flashmoe.tools.kernels.source import archive_name, fetch, unpack
from tests.builder.conftest import Make

VERSION = "2026.1.1"
NAME = archive_name(VERSION)
CONTENT = b"not really an archive"
SUM = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No index but those that a test names."""
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_CERT", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def local_index(folder: Path, link: str) -> str:
    """An index in a folder, in HTML (PEP 503)."""
    page = folder / "simple" / "xllamacpp"
    page.mkdir(parents=True)
    (page / "index.html").write_text(f'<html><body><a href="{link}">a file</a></body></html>')
    (folder / NAME).write_bytes(CONTENT)
    return (folder / "simple").as_uri()


def test_from_a_local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", local_index(tmp_path, f"../../{NAME}#sha256={SUM}"))
    (tmp_path / "out").mkdir()
    seen: list[tuple[str, int, int]] = []
    path = fetch(VERSION, tmp_path / "out", lambda *n: seen.append(n))
    assert (path, path.read_bytes()) == (tmp_path / "out" / NAME, CONTENT)
    assert seen == [("fetch", len(CONTENT), len(CONTENT))]


def test_another_file_than_the_index_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", local_index(tmp_path, f"../../{NAME}#sha256={'0' * 64}"))
    with pytest.raises(FlashMoEError, match="not the file that the index names"):
        fetch(VERSION, tmp_path, lambda *_: None)


@pytest.mark.parametrize("link", ["../../other.tar.gz#sha256=0", f"../../{NAME}"])
def test_an_index_without_the_file_or_its_checksum(
    link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", local_index(tmp_path, link))
    with pytest.raises(FlashMoEError, match=f"{NAME}: cannot be downloaded .*`flashmoe engine build FILE`"):
        fetch(VERSION, tmp_path, lambda *_: None)


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")  # nothing listens there
    with pytest.raises(FlashMoEError, match="Without a network, fetch that file from PyPI") as caught:
        fetch(VERSION, tmp_path, lambda *_: None)
    assert "secret" not in str(caught.value)


@pytest.fixture
def served() -> Iterator[str]:
    """An index that speaks JSON (PEP 691) and wants a password; its address with it."""

    class Index(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Authorization") != f"Basic {b64encode(b'me:p@ss').decode()}":
                self.send_error(401)
                return
            if self.path == "/simple/xllamacpp/":
                files = [{"filename": "other", "url": "x", "hashes": {}}]
                files += [{"filename": NAME, "url": f"../../files/{NAME}", "hashes": {"sha256": SUM}}]
                self._send("application/vnd.pypi.simple.v1+json", json.dumps({"files": files}).encode())
            else:
                assert self.path == f"/files/{NAME}"
                self._send("application/gzip", CONTENT)

        def _send(self, kind: str, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://me:p%40ss@127.0.0.1:{server.server_port}/simple/"
    server.shutdown()
    server.server_close()


def test_an_index_of_json_with_a_password(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", served)  # asked when the first has not answered
    assert fetch(VERSION, tmp_path, lambda *_: None).read_bytes() == CONTENT


def test_only_ggml_is_unpacked(source: Make, tmp_path: Path) -> None:
    version = kernels.wheel_version()
    ggml = unpack(source({"a": (1, "")}), version, tmp_path / "out")
    assert (ggml / "a.c").is_file()
    assert (ggml / "ggml.pc.in").is_file()


def archive(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    return path


def test_nothing_leaves_the_folder(tmp_path: Path) -> None:
    root = f"xllamacpp-{VERSION}/thirdparty/llama.cpp/ggml"
    path = archive(tmp_path / NAME, f"{root}/CMakeLists.txt", f"{root}/../../../../out.txt", "/tmp/out.txt")
    unpack(path, VERSION, tmp_path / "inside")
    assert [p.name for p in (tmp_path / "inside").rglob("*") if p.is_file()] == [
        "CMakeLists.txt",
        "ggml.pc.in",
    ]
    assert not (tmp_path / "out.txt").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", "other version"])
def test_archives_of_something_else(content: bytes | str, source: Make, tmp_path: Path) -> None:
    path = tmp_path / NAME
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path = source({"a": (1, "")}, version="2025.1.1")
    with pytest.raises(FlashMoEError, match="cannot be unpacked|has no ggml of xllamacpp 2026.1.1"):
        unpack(path, VERSION, tmp_path / "out")
