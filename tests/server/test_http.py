"""`flashmoe serve` as a process: keys, slow clients, hang-ups, the end, telemetry, metrics. See also test_front.py."""

from __future__ import annotations

import base64
import json
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import openai
import psutil
import pytest
from openai import OpenAI

from tests.cli.runner import own_process
from tests.server.front import until
from tests.server.hangups import connect, hang_up_at_random, wait_for_idle
from tests.server.load import ask
from tests.server.process import ServerProcess, serving

KEY = "correct horse"
DOCS = Path(__file__).parents[2] / "docs"
BODY: dict[str, Any] = {"prompt": "The sea", "max_tokens": 4}


@pytest.fixture(scope="module")
def guarded(demo: Path) -> Any:
    """A server with a key, an allowed origin, and one slot."""
    arguments = ("--cache", "50%", "--parallel", 1, "--cors", "http://friend.example")
    with serving(demo, *arguments, env={"FLASHMOE_API_KEY": KEY}) as process:
        yield process


def test_key(guarded: ServerProcess) -> None:
    with guarded.client("wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with guarded.client(KEY) as client:
        assert client.models.list().data
    for path in ("metrics", "flashmoe/live", "v1/models", "props", "slots"):
        assert httpx.get(f"{guarded.url}/{path}").status_code == 401
    for path in ("health", "ready", "", "flashmoe/"):
        assert httpx.get(f"{guarded.url}/{path}").status_code == 200


def test_pages_of_other_origins(guarded: ServerProcess) -> None:
    headers = {"Origin": "http://friend.example", "Authorization": f"Bearer {KEY}"}
    answer = httpx.get(f"{guarded.url}/v1/models", headers=headers)
    assert answer.headers["access-control-allow-origin"] == "http://friend.example"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"x"', b'{"prompt": ', b"\xff\xfe", b"[" * 100_000]
)
def test_bodies_that_are_not_requests(server: ServerProcess, content: bytes) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=content)
    assert answer.status_code in (400, 500)
    assert answer.json()["error"]["message"]


def test_too_large(server: ServerProcess) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x" * 2_000_000})
    assert answer.status_code in (400, 413)
    assert answer.json()["error"]["message"]


def test_slow_clients_block_nobody(server: ServerProcess, client: OpenAI) -> None:
    address = urlsplit(server.url)
    slow = [socket.create_connection((address.hostname, address.port)) for _ in range(40)]
    try:
        for i, sock in enumerate(slow):
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"[: 10 + i])
        slow[0].sendall(b"")
        answer = client.completions.create(model="any", **BODY)
        assert answer.usage
        assert answer.usage.completion_tokens == 4
    finally:
        for sock in slow:
            sock.close()


def test_hang_up_frees_the_work_at_once(guarded: ServerProcess) -> None:
    """One slot, a long answer whose client goes, then a request that need not wait for its end."""
    long = {"prompt": "The sea", "max_tokens": 480, "ignore_eos": True, "stream": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    before = tokens(guarded, "decode", KEY)
    connection = connect(guarded)
    connection.request("POST", "/v1/completions", json.dumps(long), headers)
    response = connection.getresponse()
    while b"text" not in response.readline():
        pass
    response.close()
    connection.close()
    wait_for_idle(guarded, KEY)
    time.sleep(0.2)
    assert tokens(guarded, "decode", KEY) - before < 400
    until(lambda: 'flashmoe_requests_total{outcome="cancelled"} 1.0' in metrics(guarded, KEY))
    with guarded.client(KEY) as client:
        assert client.completions.create(model="any", **BODY).usage


def tokens(server: ServerProcess, phase: str, key: str = "none") -> int:
    """Tokens evaluated so far."""
    answer = httpx.get(f"{server.url}/flashmoe/live", headers={"Authorization": f"Bearer {key}"})
    return int(answer.json()[phase]["tokens"])


def test_hang_ups_at_random(server: ServerProcess, client: OpenAI) -> None:
    """Every way to go with every patience: 3 * 4 * 5 of them. tests/server/load.py has more at once."""
    hang_up_at_random(server, 60, 16)
    wait_for_idle(server)
    assert client.completions.create(model="any", **BODY).usage


def test_load_leaves_memory_as_it_was(server: ServerProcess) -> None:
    """A short version of tests/server/load.py."""
    process = psutil.Process(server.pid)
    ask(server, 8, 2, max_tokens=8)
    before = process.memory_info().rss
    ask(server, 8, 5, max_tokens=8)
    assert process.memory_info().rss < 1.05 * before


def metrics(server: ServerProcess, key: str = "none") -> str:
    return httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {key}"}).text


def test_metrics_and_their_dashboard(server: ServerProcess, client: OpenAI) -> None:
    client.completions.create(model="any", **BODY)
    ok = re.compile(r'flashmoe_requests_total{outcome="ok"} (\S+)')
    until(lambda: float(ok.findall(metrics(server))[0]) > 0)
    text = metrics(server)
    assert float(re.findall(r'flashmoe_tokens_total{phase="decode"} (\S+)', text)[0]) > 0
    assert float(re.findall(r"\nflashmoe_memory_resident_bytes (\S+)", text)[0]) > 1e7
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    names.add("flashmoe_recent_hit_rate")  # once there was enough to compare
    dashboard = json.loads((DOCS / "grafana-dashboard.json").read_text())
    used = set(
        re.findall(r"(?:flashmoe_|llamacpp:)\w+", json.dumps([p["targets"] for p in dashboard["panels"]]))
    )
    assert used
    assert used <= names


def test_hit_rate_is_compared_while_somebody_looks(server: ServerProcess, client: OpenAI) -> None:
    """The first look begins it; then there are three figures, in frames and metrics, and what would help."""
    with httpx.stream("GET", f"{server.url}/flashmoe/live/stream?hz=5") as stream:
        frames = (json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line)
        next(frames)
        for _ in range(4):
            client.completions.create(
                model="any", prompt="The moon", max_tokens=40, extra_body={"ignore_eos": True}
            )
        frame = next(frame for frame in frames if frame["advice"])
    compared = frame["compared"]
    assert re.match("(ssd|compute)-bound: .* tokens/s", frame["advice"]["sentence"])
    assert compared["tokens"] > 0
    assert 0 < compared["lru"] < compared["belady"]
    assert 0 < compared["hit_rate"] <= compared["belady"]
    rates = dict(re.findall(r'flashmoe_recent_hit_rate\{of="(\w+)"\} (\S+)', metrics(server)))
    assert set(rates) == {"cache", "lru", "belady"}


def test_live_stream_sees_a_generation(server: ServerProcess, client: OpenAI) -> None:
    info = httpx.get(f"{server.url}/flashmoe/info").json()
    assert (info["layers"], info["experts"], info["top_k"]) == (8, 32, 4)
    frames = []
    with httpx.stream("GET", f"{server.url}/flashmoe/live/stream?hz=20") as stream:
        for line in stream.iter_lines():
            if not line:
                continue
            frames.append(json.loads(line.removeprefix("data: ")))
            if len(frames) == 1:
                client.completions.create(model="any", prompt="The moon", max_tokens=24)
            if len(frames) > 3 and frames[-1]["decode"]["tokens"] > frames[0]["decode"]["tokens"]:
                break
    cells = [base64.b64decode(frame["map"]) for frame in frames]
    assert {len(c) for c in cells} == {info["layers"] * info["experts"]}
    resident = sum(cell & 1 for cell in cells[-1])
    assert 0 < resident <= info["slots"]
    assert any(cell & 2 for c in cells for cell in c)  # used
    assert not any(cell & 4 and not cell & 2 for c in cells for cell in c)  # missed, hence used
    assert httpx.get(f"{server.url}/flashmoe/live/stream?hz=1000").status_code == 400


def test_warning_on_other_addresses(demo: Path) -> None:
    with serving(demo, "--cache", "50%", "--host", "0.0.0.0") as server:
        assert any("no key is set" in line for line in server.messages)
    with serving(demo, "--cache", "50%", "--host", "0.0.0.0", "--api-key", KEY) as server:
        assert not any("no key is set" in line for line in server.messages)


def test_port_that_is_taken(server: ServerProcess) -> None:
    result = own_process("serve", "demo", "--port", urlsplit(server.url).port or 0)
    assert result.status == 2
    assert "cannot listen" in result.message


def test_examples_of_the_documentation(server: ServerProcess) -> None:
    """The curl commands in docs/server.md, run as they stand but for the port."""
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / "server.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        command = block.replace("http://127.0.0.1:8080", server.url)
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert '"error":' not in done.stdout
        assert done.stdout.strip()
