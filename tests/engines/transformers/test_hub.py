"""hf:organisation/repository from a hub that is a server on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.cli.runner import own_process
from tests.engines.transformers.conftest import Checkpoints

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs: what org/repo holds, and its files."""

    folder: Path
    given: set[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        files = sorted(file.name for file in self.folder.iterdir())
        if path.startswith("/api/models/org/repo/tree/"):
            data = json.dumps([self._entry(name) for name in files]).encode()
        elif path.startswith("/api/models/org/repo"):
            siblings = [{"rfilename": name} for name in files]
            data = json.dumps({"id": "org/repo", "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith("/org/repo/resolve/") and path.rpartition("/")[2] in files:
            name = path.rpartition("/")[2]
            data = (self.folder / name).read_bytes()
            if body:
                self.given.add(name)
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for name, value in (
            ("ETag", f'"{hashlib.sha1(data).hexdigest()}"'),
            ("X-Repo-Commit", COMMIT),
            ("Content-Length", str(len(data))),
            ("Content-Type", "application/json"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _entry(self, name: str) -> dict[str, object]:
        data = (self.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    handler = type("Handler", (Hub,), {"given": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()


def test_a_checkpoint_on_the_hub(hub: tuple[str, type[Hub]], checkpoint: Checkpoints, tmp_path: Path) -> None:
    url, handler = hub
    handler.folder = tmp_path / "repo"
    handler.folder.mkdir()
    for file in checkpoint("olmoe").iterdir():
        (handler.folder / file.name).symlink_to(file)
    (handler.folder / "pytorch_model.bin").write_bytes(b"not wanted")
    env = {
        "HF_ENDPOINT": url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    options = ("--engine", "transformers", "-p", "x", "--cache", "50%", "-t", 1)
    found = own_process("run", "hf:org/repo", *options, env=env)
    assert found.status == 1
    assert found.err.endswith("has no tokenizer; give the prompt as token ids\n")  # it has been loaded, then
    assert {"config.json", "model.safetensors"} <= handler.given
    assert "pytorch_model.bin" not in handler.given
