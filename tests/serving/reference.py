"""The stock server out of the same wheel, told what a model's own server is told, and a client of both.

with pair(model) as both:
    answer = both.post("/v1/chat/completions", {...})  # asked of both, asserted to be the same
"""

from __future__ import annotations

import http.client
import json
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import xllamacpp

from flashmoe.engines.llamacpp.engine import LlamaEngine
from flashmoe.engines.llamacpp.serving.options import ServerOptions
from flashmoe.engines.llamacpp.serving.server import InnerServer, _params
from flashmoe.runtime.layout import PLAIN
from flashmoe.runtime.model import Model

KEY = "the stock server's key"


class Answer(NamedTuple):
    """status, and the JSON of the body, or a list of all events of a stream."""

    status: int
    body: Any


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=120)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


@dataclass
class Client:
    """A client of a server on a Unix socket."""

    socket: str
    key: str

    def ask(self, method: str, path: str, body: Any = None) -> Answer:
        connection = UnixConnection(self.socket)
        try:
            headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body).encode(), headers)
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        if response.headers.get_content_type() == "text/event-stream":
            return Answer(response.status, [_event(line) for line in data.split(b"\n") if b"data: " in line])
        return Answer(response.status, json.loads(data))

    def post(self, path: str, body: Any) -> Answer:
        return self.ask("POST", path, body)


def _event(line: bytes) -> Any:
    data = line.partition(b"data: ")[2]
    return "[DONE]" if data == b"[DONE]" else json.loads(data)


class StockServer(Client):
    """The wheel's server on `like`'s file, which it loads by itself. Raises RuntimeError where it does not start."""

    def __init__(self, like: Model, options: ServerOptions | None = None) -> None:
        engine = like.engine
        assert isinstance(engine, LlamaEngine)
        options = options or like._server_options
        assert options
        self._folder = tempfile.TemporaryDirectory(prefix="stock-")
        super().__init__(f"{self._folder.name}/http.sock", KEY)
        params = _params(engine, options, self.socket, self.key)
        params.no_extra_bufts = like.layout == PLAIN
        params.n_gpu_layers = 0
        self._server = xllamacpp.Server(params)
        self.ask("GET", "/slots")  # a server forgets an end that comes before its loop has begun

    def close(self) -> None:
        self._server = None
        self._folder.cleanup()


_NAMES = ("id", "item_id", "call_id", "tool_call_id", "response_id")
_TIMES = ("created", "created_at", "completed_at", "time_ms")


def plain(value: Any) -> Any:
    """An answer without what differs from one server to another: random names, times, and how long things took."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for name, item in value.items():
        if name in _TIMES or (name in _NAMES and isinstance(item, str)):
            continue
        if name == "timings":
            item = {key: number for key, number in item.items() if key.endswith("_n")}
        kept[name] = plain(item)
    return kept


@dataclass
class Pair:
    ours: Client
    stock: Client
    inner: InnerServer

    def ask(self, method: str, path: str, body: Any = None) -> Answer:
        """What both answer."""
        ours, stock = self.ours.ask(method, path, body), self.stock.ask(method, path, body)
        assert plain(ours.body) == plain(stock.body)
        assert ours.status == stock.status
        return ours

    def post(self, path: str, body: Any) -> Any:
        """The answer of both, which is none of an error."""
        answer = self.ask("POST", path, body)
        assert answer.status == 200, answer
        return answer.body


@contextmanager
def pair(model: Model, **options: Any) -> Iterator[Pair]:
    """The model's server and the stock one. options: in place of those that the model was loaded with."""
    assert model._server_options
    before = model._server_options
    model._own_context()
    model._server_options = replace(before, **options)
    stock = None
    try:
        inner = model.server()
        stock = StockServer(model)
        yield Pair(Client(inner.socket, inner.key), stock, inner)
    finally:
        if stock:
            stock.close()
        model._own_context()
        model._server_options = before


def shared(*parts: str) -> Path:
    """A path beside the checkout."""
    return Path(__file__).parents[3].joinpath("shared", *parts)
