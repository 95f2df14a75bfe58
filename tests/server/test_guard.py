"""Who gets an answer of the front: keys, names, pages of other origins, and sizes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from aiohttp import web

from flashmoe.runtime.model import Model
from flashmoe.server import body as bodies
from tests.server.front import KEY, Backend, Running, fronted, made_up_server

OUR_KEY = "correct horse"
FRIEND = "http://friend.example"


async def echo(request: web.Request) -> web.Response:
    """Says what has arrived. (The real server answers 401 where the key is not right; see test_front.py.)"""
    content = await request.read()
    seen = {
        "method": request.method,
        "target": request.raw_path,
        "headers": {name.lower(): value for name, value in request.headers.items()},
        "size": len(content),
    }
    crossing = {"Access-Control-Allow-Origin": "*", "X-Theirs": "yes", "Connection": "X-Hop", "X-Hop": "1"}
    return web.json_response(seen, headers=crossing)


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with made_up_server(echo, tmp_path_factory.mktemp("made-up")) as backend:
        yield backend


@pytest.fixture(scope="module")
def guarded(pool: Model, backend: Backend) -> Iterator[Running]:
    with fronted(pool, backend, api_key=OUR_KEY, cors=[FRIEND]) as running:
        yield running


@pytest.mark.parametrize("key", ["", "wrong", OUR_KEY + "x", OUR_KEY[:-1], "\u00e9", KEY])
def test_wrong_key(guarded: Running, key: str) -> None:
    for headers in ({"Authorization": f"Bearer {key}".rstrip().encode()}, {"X-Api-Key": key.encode()}):
        answer = httpx.post(f"{guarded.url}/v1/completions", json={}, headers=headers)
        assert answer.status_code == 401
        error = answer.json()["error"]
        assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
        answer = httpx.post(f"{guarded.url}/v1/messages", json={}, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["type"] == "error"
        assert answer.json()["error"]["type"] == "authentication_error"
        for path in ("metrics", "flashmoe/live", "flashmoe/info", "flashmoe/nope"):
            assert httpx.get(f"{guarded.url}/{path}", headers=headers).status_code == 401
        seen = httpx.get(f"{guarded.url}/v1/models", headers=headers).json()
        assert not {"authorization", "x-api-key"} & set(seen["headers"])  # passed on, but with no key
        assert httpx.get(f"{guarded.url}/flashmoe/", headers=headers).status_code == 200
        assert httpx.get(f"{guarded.url}/ready", headers=headers).status_code == 200


@pytest.mark.parametrize("headers", [{"Authorization": f"bearer {OUR_KEY}"}, {"X-Api-Key": OUR_KEY}])
def test_right_key(guarded: Running, headers: dict[str, str]) -> None:
    for method, path in (("POST", "v1/messages"), ("GET", "v1/models"), ("DELETE", "v1/stream")):
        seen = httpx.request(method, f"{guarded.url}/{path}", headers=headers).json()
        assert seen["headers"]["authorization"] == f"Bearer {KEY}"
        assert "x-api-key" not in seen["headers"]
    assert httpx.get(f"{guarded.url}/metrics", headers=headers).status_code == 200


def test_headers_that_go_through(front: Running) -> None:
    sent = {"X-Mine": "Grüße".encode(), "Connection": "X-Once, keep-alive", "X-Once": "1", "Cookie": "a=b"}
    answer = httpx.post(f"{front.url}/v1/x%2Fy?a=b%20c&d", json={"a": 1}, headers=sent)
    seen = answer.json()
    assert seen["target"] == "/v1/x%2Fy?a=b%20c&d"
    assert seen["headers"]["x-mine"] == "Grüße"
    assert seen["headers"]["cookie"] == "a=b"
    assert seen["headers"]["content-type"] == "application/json"
    assert "x-once" not in seen["headers"]
    assert answer.headers["x-theirs"] == "yes"
    assert "x-hop" not in answer.headers
    assert "access-control-allow-origin" not in answer.headers


def test_names_that_point_here(front: Running) -> None:
    for name in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "8.8.8.8", ""):
        answer = httpx.get(f"{front.url}/v1/models", headers={"Host": name})
        assert answer.status_code in (400, 421), name
    for name in ("localhost", "LOCALHOST:1", "[::1]:80", "[::1]", "127.0.0.2", "127.0.0.1:99"):
        assert httpx.get(f"{front.url}/v1/models", headers={"Host": name}).status_code == 200, name


def test_pages_of_other_origins(front: Running, guarded: Running) -> None:
    ask = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    url = f"{guarded.url}/v1/completions"
    friend = httpx.options(url, headers={"Origin": FRIEND, **ask})
    assert friend.headers["access-control-allow-origin"] == FRIEND
    allowed = "access-control-allow-origin"
    assert allowed not in httpx.options(url, headers={"Origin": "http://foe.example", **ask}).headers
    assert (
        allowed not in httpx.options(front.url + "/v1/completions", headers={"Origin": FRIEND, **ask}).headers
    )
    answer = httpx.get(f"{guarded.url}/v1/models", headers={"Origin": FRIEND})
    assert answer.headers[allowed] == FRIEND
    refused = httpx.post(url, json={}, headers={"Origin": FRIEND})  # the page may read why
    assert (refused.status_code, refused.headers[allowed]) == (401, FRIEND)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_pages_send_without_asking(front: Running, kind: str) -> None:
    def post(**headers: str) -> int:
        url = f"{front.url}/v1/completions"
        sent = {"Content-Type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
        return httpx.post(url, content=b"{}", headers=sent).status_code

    assert post() == 200  # no page at all
    assert post(Origin="http://foe.example") == 403
    assert post(Origin="null") == 403
    assert post(Origin=front.url, Sec_Fetch_Site="cross-site") == 403
    assert post(Origin=front.url) == 200
    assert post(Origin=front.url, Sec_Fetch_Site="same-origin") == 200


def test_too_large(front: Running) -> None:
    def stream() -> Iterator[bytes]:
        for _ in range(64):
            yield b"x" * 65536

    contents: list[Any] = [b"x" * 2_000_000, stream()]
    for content in contents:
        answer = httpx.post(f"{front.url}/v1/completions", content=content)
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "invalid_request_error"
    answer = httpx.post(f"{front.url}/v1/messages", content=b"x" * 2_000_000)
    assert answer.json()["error"]["type"] == "request_too_large"
    assert (
        httpx.post(f"{front.url}/v1/completions", content=b"x" * bodies.LEAST_BODY).json()["size"] == 1 << 20
    )


LIMIT = 512 * 16  # bytes of the longest text, see Backend


@pytest.mark.parametrize(
    ("field", "refused"),
    [
        ({"prompt": "x" * (LIMIT + 1)}, True),
        ({"prompt": "x" * LIMIT}, False),
        ({"prompt": ["ß" * (LIMIT // 2 + 1)]}, True),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 2 * LIMIT}]}]}, True),
        ({"messages": [{"role": "user", "content": "x" * LIMIT}] * 3}, False),  # the backend counts tokens
        (
            {"messages": [{"content": [{"image_url": {"url": "data:image/png;base64," + "x" * LIMIT}}]}]},
            False,
        ),
        ({"messages": [{"content": [{"source": {"data": "x" * 2 * LIMIT}}]}]}, False),
        ({"input": "x" * 2 * LIMIT}, True),
        ({"system": "x" * 2 * LIMIT, "messages": []}, True),
        ({"tools": [{"function": {"description": "x" * 2 * LIMIT}}]}, False),
        ({"prompt": 7, "x": "\ud800" * LIMIT}, False),
    ],
)
def test_text_that_cannot_fit(front: Running, field: dict[str, Any], refused: bool) -> None:
    answer = httpx.post(f"{front.url}/v1/chat/completions", content=json.dumps(field))
    assert answer.status_code == (400 if refused else 200)
    if refused:
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("exceed_context_size_error", "context_length_exceeded")
        assert error["n_ctx"] == 512


def test_pictures_are_larger_than_text(pool: Model, backend: Backend) -> None:
    sees = Backend(backend.socket, multimodal=True)
    with fronted(pool, sees) as front:
        content = json.dumps({"messages": [{"content": "data:image/png;base64," + "x" * (8 << 20)}]})
        answer = httpx.post(f"{front.url}/v1/chat/completions", content=content, timeout=60)
        assert answer.json()["size"] == len(content)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"[" * 100_000, 400),
        (b'{"chat_template_kwargs": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}", 400),
        (b'{"x": "' + b'\\"[' * 1000 + b'"}', 200),
        (b'{"x": [' + b",".join([b"[{}]"] * 1000) + b"]}", 200),
        (b"[" * 256 + b"]" * 256, 200),
        (b"[" * 257 + b"]" * 257, 400),
        (b"\xff\xfe" * 9000, 200),  # for the backend to refuse
    ],
)
def test_nesting(front: Running, content: bytes, status: int) -> None:
    """The library's server walks JSON by recursion: 100,000 levels in a template's arguments end the process."""
    assert httpx.post(f"{front.url}/v1/chat/completions", content=content).status_code == status
