"""Whatever is sent, there is an answer, an error has words, and the server goes on answering."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.process import ServerProcess

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
NUMBER = st.integers(-3, 5) | st.floats(-3, 3) | JSON
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool"]),
        "content": st.text(max_size=40) | JSON,
    },
    optional={"tool_calls": JSON, "name": JSON},
)
SCHEMA = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["object", "array", "string", "integer", "null", "no such type"]),
        "enum": JSON,
        "properties": st.dictionaries(
            st.text(max_size=5), st.sampled_from([{"type": "string"}, {}, True]), max_size=3
        ),
        "required": JSON,
        "pattern": st.text(max_size=8),
        "$ref": st.sampled_from(["#", "#/nowhere", "http://localhost/x", "file:///etc/passwd"]),
        "maxLength": NUMBER,
    },
)
TOOL = st.builds(
    lambda name, schema: {"type": "function", "function": {"name": name, "parameters": schema}},
    st.sampled_from(["one", "two"]) | st.text(max_size=5),
    SCHEMA,
)
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": NUMBER,
    "seed": NUMBER,
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3) | JSON,
    "n": st.integers(0, 3) | JSON,
    "logit_bias": st.dictionaries(st.integers(-2, 5000).map(str), NUMBER, max_size=3) | JSON,
    "presence_penalty": NUMBER,
    "stream": st.booleans() | JSON,
    "stream_options": st.sampled_from([{"include_usage": True}, None]) | JSON,
}
LIMIT = st.integers(0, 4)
CHAT = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=3) | JSON, "max_tokens": LIMIT},
    optional={
        **COMMON,
        "logprobs": st.booleans() | JSON,
        "top_logprobs": NUMBER,
        "tools": st.lists(TOOL, max_size=2) | JSON,
        "tool_choice": st.sampled_from(["none", "auto", "required"]) | JSON,
        "response_format": st.builds(
            lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, SCHEMA
        )
        | st.just({"type": "json_object"})
        | JSON,
    },
)
COMPLETION = st.fixed_dictionaries(
    {
        "prompt": st.text(max_size=40) | st.lists(st.integers(-2, 5000), max_size=4) | JSON,
        "max_tokens": LIMIT,
    },
    optional={**COMMON, "logprobs": NUMBER},
)
FEW = settings(max_examples=60, suppress_health_check=list(HealthCheck))


def post(server: ServerProcess, path: str, body: Any) -> None:
    try:
        content = json.dumps(body, allow_nan=False)
    except ValueError:  # not JSON
        return
    answer = httpx.post(
        f"{server.url}{path}", content=content, timeout=60, headers={"Content-Type": "application/json"}
    )
    # the library's server calls some wrong types a fault of its own
    assert answer.status_code in (200, 400, 500), (answer.status_code, answer.text, body)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"] not in ("", "internal error")


@FEW
@given(body=CHAT)
def test_chat(server: ServerProcess, body: Any) -> None:
    post(server, "/v1/chat/completions", body)


@FEW
@given(body=COMPLETION)
def test_completions(server: ServerProcess, body: Any) -> None:
    post(server, "/v1/completions", body)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=200))
def test_garbage(server: ServerProcess, path: str, content: bytes) -> None:
    answer = httpx.post(f"{server.url}{path}", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 500, 501)
    assert answer.json()["error"]["message"]


def test_it_still_answers(server: ServerProcess) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "The sea", "max_tokens": 2})
    assert answer.status_code == 200
