"""The field `approx` of a request, and what an approximate server says of itself."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.process import ServerProcess, serving

BODY = {"prompt": "The old man went down to the harbour", "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def approximate(demo: Path) -> Iterator[ServerProcess]:
    with serving(demo, "--cache", "25%", "--approx", "cache:2+drop:1", "--prefetch", "none") as process:
        yield process


def ask(server: ServerProcess, **fields: Any) -> str:
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(BODY | fields).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        return str(json.load(response)["choices"][0]["text"])


def frame(server: ServerProcess) -> Any:
    with urllib.request.urlopen(f"{server.url}/flashmoe/live") as response:
        return json.load(response)["approximate"]


def test_field(approximate: ServerProcess) -> None:
    lossy = ask(approximate)
    counted = frame(approximate)
    assert counted["replaced"] > 0
    assert counted["dropped"] > 0
    exact = ask(approximate, approx=0)
    after = frame(approximate)
    assert (after["replaced"], after["dropped"]) == (counted["replaced"], counted["dropped"])
    assert after["routed"] > counted["routed"]
    assert exact != lossy
    assert ask(approximate, approx="none") == ask(approximate, approx=False) == exact
    assert ask(approximate, approx="cache:2+drop:1")
    assert frame(approximate)["replaced"] > counted["replaced"]


def test_another_approximation_is_refused(approximate: ServerProcess) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(approximate, approx="drop:0.1")
    assert refused.value.code == 400
    assert "was started with --approx cache:2+drop:1" in refused.value.read().decode()


def test_metrics(approximate: ServerProcess) -> None:
    ask(approximate)
    with urllib.request.urlopen(f"{approximate.url}/metrics") as response:
        lines = dict(
            line.rsplit(" ", 1) for line in response.read().decode().splitlines() if "experts_" in line
        )
    assert float(lines["flashmoe_experts_replaced_total"]) > 0
    assert float(lines["flashmoe_experts_dropped_total"]) > 0
