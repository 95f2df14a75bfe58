"""The front before the library's own server: what goes through, what is counted, and hang-ups."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest

from tests.server.front import KEY, Backend, Running, stock_server, until

CHAT = {"messages": [{"role": "user", "content": "The sea"}], "max_tokens": 12, "temperature": 0, "seed": 1}
LONG: dict[str, Any] = {"prompt": "The sea", "n_predict": 480, "ignore_eos": True, "temperature": 0}
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def backend(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with stock_server(demo, tmp_path_factory.mktemp("stock")) as backend:
        yield backend


@pytest.fixture(scope="module")
def direct(backend: Backend) -> Iterator[httpx.Client]:
    """The backend without the front."""
    transport = httpx.HTTPTransport(uds=backend.socket)
    with httpx.Client(transport=transport, base_url="http://localhost", headers=AUTHORIZED) as client:
        yield client


def lasting(text: str) -> str:
    """A response without what differs from one to the next: ids, times, and what the KV cache held already.

    And without the `param` that the front adds to errors, for OpenAI's clients.
    """
    if text.startswith(("data:", "event:")):
        return "\n".join(
            lasting(line[6:]) if line.startswith("data: {") else line for line in text.split("\n")
        )

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            drop = ("id", "item_id", "created", "created_at", "completed_at", "timings", "call_id", "param")
            return {
                k: strip(v)
                for k, v in value.items()
                if k not in drop and "tokens" not in k and "id_" not in k
            }
        return [strip(v) for v in value] if isinstance(value, list) else value

    try:
        return json.dumps(strip(json.loads(text)))
    except ValueError:
        return text


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/chat/completions", CHAT),
        ("POST", "/v1/chat/completions", {**CHAT, "stream": True}),
        ("POST", "/chat/completions", CHAT),
        ("POST", "/v1/completions", {"prompt": "The sea", "max_tokens": 5, "temperature": 0}),
        ("POST", "/v1/responses", {"input": "The sea", "max_output_tokens": 8, "temperature": 0}),
        ("POST", "/v1/responses", {"input": "A", "max_output_tokens": 8, "temperature": 0, "stream": True}),
        ("POST", "/v1/messages", CHAT),
        ("POST", "/v1/messages", {**CHAT, "stream": True}),
        ("POST", "/v1/messages/count_tokens", CHAT),
        ("POST", "/tokenize", {"content": "Grüße, 世界", "with_pieces": True}),
        ("POST", "/v1/chat/completions", {"messages": "no list"}),
        ("GET", "/v1/models", None),
        ("GET", "/props", None),
        ("GET", "/health?really=yes&x=%20%2F", None),
    ],
)
def test_what_goes_through(
    front: Running, direct: httpx.Client, method: str, path: str, body: dict[str, Any] | None
) -> None:
    theirs = direct.request(method, path, json=body)
    ours = httpx.request(method, front.url + path, json=body)
    assert ours.status_code == theirs.status_code
    assert lasting(ours.text) == lasting(theirs.text)
    for name in ("content-type", "server"):
        assert ours.headers[name] == theirs.headers[name]
    assert "keep-alive" not in ours.headers
    assert not [name for name in ours.headers if name.startswith("access-control")]


def test_options_have_our_names(front: Running, direct: httpx.Client) -> None:
    """Where the backend says with which of its options it would have answered."""
    advice = {
        "/v1/embeddings": (
            "Start it with `--embeddings`",
            "Start it with `--pooling mean` (or last, or cls)",
        ),
        "/v1/rerank": (" Start it with `--reranking`", ""),
    }
    for path, (theirs, ours) in advice.items():
        body = {"input": "The sea", "query": "The sea", "documents": ["A colour"]}
        expected = direct.post(path, json=body).json()["error"]["message"]
        assert theirs in expected
        answer = httpx.post(front.url + path, json=body)
        assert answer.status_code == 501
        assert answer.json()["error"]["message"] == expected.replace(theirs, ours)


def test_bytes_are_not_touched(front: Running, direct: httpx.Client) -> None:
    """The same bytes where nothing in them depends on the time; a compressed page stays so."""
    for path in ("/v1/models/none", "/props", "/slots"):
        ours, theirs = httpx.get(front.url + path), direct.get(path)
        if "File Not Found" not in theirs.text:
            assert ours.content == theirs.content
    with httpx.stream("GET", front.url, headers={"Accept-Encoding": "gzip"}) as ours:
        packed = b"".join(ours.iter_raw())
    with direct.stream("GET", "/", headers={"Accept-Encoding": "gzip"}) as theirs:
        assert packed == b"".join(theirs.iter_raw())
        assert ours.headers["etag"] == theirs.headers["etag"]
    again = httpx.get(front.url, headers={"If-None-Match": ours.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_page_for_clients_without_gzip(front: Running) -> None:
    answer = httpx.get(front.url, headers={"Accept-Encoding": "identity"})
    assert answer.status_code == 200
    assert "content-encoding" not in answer.headers
    assert "<!doctype html" in answer.text.lower()
    for accepted in ("identity", "gzip"):
        head = httpx.head(front.url, headers={"Accept-Encoding": accepted})
        assert (head.status_code, head.content) == (200, b"")


def test_json_that_is_called_a_form(front: Running) -> None:
    """What `curl -d` sends."""
    body = json.dumps({**CHAT, "padding": "x" * 20_000})
    for headers in ({"Content-Type": "application/x-www-form-urlencoded"}, {}):
        answer = httpx.post(f"{front.url}/v1/chat/completions", content=body, headers=headers)
        assert answer.status_code == 200, answer.text


def test_routes_that_do_not_exist(front: Running) -> None:
    for method, path in (("GET", "nope"), ("POST", "v1/v1/chat/completions"), ("PUT", "v1/models")):
        answer = httpx.request(method, f"{front.url}/{path}")
        assert answer.status_code == 404
        assert f"no {method} /{path}" in answer.json()["error"]["message"]
    assert httpx.post(f"{front.url}/v1/messages/nope").json()["error"]["type"] == "not_found_error"
    for path in ("../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "/flashmoe/../etc", "%00", "?", "//x"):
        assert httpx.get(f"{front.url}/{path}").status_code in (200, 400, 404)


def test_stream_comes_in_pieces(front: Running) -> None:
    with httpx.stream("POST", f"{front.url}/completion", json={**LONG, "stream": True}) as answer:
        pieces = list(answer.iter_raw())
    assert len(pieces) > 240  # of 480 tokens; some come together


def busy(direct: httpx.Client) -> int:
    return sum(slot["is_processing"] for slot in direct.get("/slots").json())


def test_hang_up(front: Running, direct: httpx.Client) -> None:
    """The backend's slot is free long before the answer would be complete.

    For an answer that has not begun, see test_faults.py: the backend looks for such a hang-up only after a second in
    which it has said nothing to anybody.
    """
    traffic, before, steps = front.front.traffic, cancelled(front), figure(front, "llamacpp:n_decode_total")
    address = urlsplit(front.url)
    body = json.dumps({**LONG, "n_predict": 10_000, "stream": True})
    head = f"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((address.hostname or "", address.port or 0)) as sock:
        sock.sendall((head + body).encode())
        until(lambda: busy(direct) == 1)
        assert (traffic.running, traffic.waiting) == (1, 0)
        assert b"data: " in sock.recv(65536) + sock.recv(65536)
    until(lambda: busy(direct) == 0)
    assert figure(front, "llamacpp:n_decode_total") - steps < 1000
    until(lambda: traffic.running == 0)
    until(lambda: cancelled(front) == before + 1)


def cancelled(front: Running) -> float:
    return figure(front, 'flashmoe_requests_total{outcome="cancelled"}')


def figure(front: Running, name: str) -> float:
    text = httpx.get(f"{front.url}/metrics").text
    return float(next(line for line in text.splitlines() if line.startswith(name + " ")).rpartition(" ")[2])


def test_metrics_of_both(front: Running) -> None:
    counted = ("ok", "client_error")
    names = [f'flashmoe_requests_total{{outcome="{outcome}"}}' for outcome in counted]
    names += ["flashmoe_first_byte_seconds_count", "llamacpp:tokens_predicted_total"]
    before = [figure(front, name) for name in names]
    httpx.post(f"{front.url}/v1/chat/completions", json=CHAT)
    httpx.post(f"{front.url}/v1/chat/completions", json={"messages": "no list"})
    httpx.post(f"{front.url}/tokenize", json={"content": "x"})  # takes no slot
    until(
        lambda: [figure(front, name) - was for name, was in zip(names[:2], before[:2], strict=True)] == [1, 1]
    )
    first, tokens = (figure(front, name) - was for name, was in zip(names[2:], before[2:], strict=True))
    assert first >= 1
    assert tokens > 0
    assert figure(front, "flashmoe_pool_slots") > 0
    answer = httpx.get(f"{front.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_live(front: Running) -> None:
    info = httpx.get(f"{front.url}/flashmoe/info").json()
    assert (info["layers"], info["experts"], info["context"], info["parallel"]) == (8, 32, 512, 2)
    assert httpx.get(f"{front.url}/flashmoe/live").json()["requests"] == {"running": 0, "waiting": 0}
    frames = 0
    with httpx.stream("GET", f"{front.url}/flashmoe/live/stream?hz=30") as stream:
        for line in stream.iter_lines():
            frames += line.startswith("data: ")
            if frames == 3:
                break
    for hz in ("1000", "x", "nan", "0"):
        assert httpx.get(f"{front.url}/flashmoe/live/stream?hz={hz}").status_code == 400
    assert httpx.get(f"{front.url}/flashmoe/nope").status_code == 404
    assert httpx.post(f"{front.url}/flashmoe/live").status_code == 405


def test_page(front: Running) -> None:
    for path, kind in (("", "text/html"), ("static/main.js", "text/javascript")):
        answer = httpx.get(f"{front.url}/flashmoe/{path}")
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("static/", "static/../page.py", "static/..%2fpage.py", "static/index.html"):
        assert httpx.get(f"{front.url}/flashmoe/{path}").status_code == 404
    assert httpx.get(f"{front.url}/flashmoe", follow_redirects=True).text.startswith("<!doctype html>")


def test_errors_have_the_fields_that_clients_read(front: Running) -> None:
    """OpenAI's word for a prompt that is too long, and `param`, which its clients expect."""
    answer = httpx.post(f"{front.url}/v1/completions", json={"prompt": "word " * 1200})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["type"], error["param"]) == (
        "context_length_exceeded",
        "exceed_context_size_error",
        None,
    )
    assert error["n_prompt_tokens"] > 1200


def test_slots_are_not_saved_over_http(front: Running) -> None:
    answer = httpx.post(f"{front.url}/slots/0?action=save", json={"filename": "x"})
    assert answer.status_code == 501
    assert "--save-cache" in answer.json()["error"]["message"]
