"""Texts and schemas that are too much for a tokenizer or a grammar end no process: they are answered, or refused.

llama.cpp's tokenizers match some texts recursively: 25,000 equal characters overflow a thread's usual stack.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flashmoe
from flashmoe.engines.llamacpp.library import Library
from tests.serving.copies import copy
from tests.serving.reference import Pair, pair
from tests.serving.test_equal import GEMMA

#: Without schemas in the prompt.
SHORT = GEMMA.replace("tool.function | tojson", "tool.function.name")
PRE_TOKENIZERS = ["gpt-4o", "deepseek-v3", "llama4", "minimax-m2", "tekken"]
TOKENIZE = ("/tokenize", "content")
COMPLETE = ("/v1/completions", "prompt")

#: The models' servers are asked in a process of its own: what this is about would end the tests'. A line a model.
ASK = """
import json, sys
import flashmoe
from flashmoe.engines.llamacpp.library import find_library, open_library
from tests.serving.reference import Client
lib = open_library(find_library())
asked, *paths = sys.argv[1:]
for path in paths:
    with flashmoe.load(path, cache="50%", parallel=2, threads=1, library=lib) as model:
        inner = model.server()
        client = Client(inner.socket, inner.key)
        for character, length, path, field in json.loads(asked):
            print(client.post(path, {field: character * length, "max_tokens": 1}).status, end=" ", flush=True)
        messages = [{"role": "user", "content": "a" * 40_000}]
        print(client.post("/v1/chat/completions", {"messages": messages}).status, end=" ", flush=True)
        print(client.post("/v1/completions", {"prompt": "Hello", "max_tokens": 2}).status, flush=True)
"""


def test_equal_characters(demo: Path, tmp_path: Path) -> None:
    models = [copy(demo, tmp_path / f"{pre}.gguf", tokenizer__ggml__pre=pre) for pre in PRE_TOKENIZERS]
    asked = [(c, 40_000, *way) for c in ("a", " ", "\n", "é", "7", "!") for way in (TOKENIZE, COMPLETE)]
    asked += [("a", 1_000_000, *COMPLETE), ("é", 500_000, *TOKENIZE)]  # a million bytes
    command = [sys.executable, "-c", ASK, json.dumps(asked), *map(str, models)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, (done.stdout[-300:], done.stderr[-2000:])
    expected = [*(200 if path == "/tokenize" else 400 for _, _, path, _ in asked), 400, 200]
    assert [list(map(int, line.split())) for line in done.stdout.splitlines()] == [expected] * len(models)


@pytest.fixture(scope="module")
def servers(demo: Path, lib: Library) -> Iterator[Pair]:
    with (
        flashmoe.load(demo, cache="100%", parallel=1, threads=1, layout="plain", library=lib) as model,
        pair(model, chat_template=SHORT) as both,
    ):
        yield both


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string", "maxLength": 2}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def ask(servers: Pair, schema: dict[str, Any]) -> list[int]:
    """What both answer a schema for the answer, and for the arguments of a tool."""
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0, "seed": 1}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    called = {**chat, "tools": [tool], "tool_choice": "required"}
    return [
        servers.ask("POST", "/v1/chat/completions", body).status
        for body in ({**chat, "response_format": form}, called)
    ]


def test_nested_schemas(servers: Pair) -> None:
    assert ask(servers, nested(200)) == [200, 200]


def test_long_enumerations(servers: Pair) -> None:
    words = [f"word {number}" for number in range(3000)]
    schema = {"type": "object", "properties": {"a": {"enum": words}}, "required": ["a"]}
    assert ask(servers, schema) == [200, 200]


def test_many_repetitions(servers: Pair) -> None:
    for schema in (
        {"type": "array", "items": {"type": "string"}, "minItems": 3000, "maxItems": 100_000},
        {"type": "string", "minLength": 100_000},
        {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"},
    ):
        assert {200, 400} >= set(ask(servers, schema))
    assert servers.post("/v1/completions", {"prompt": "Hello", "max_tokens": 2, "seed": 1})


def test_nested_arguments(servers: Pair) -> None:
    """In a tool, in an earlier call of it, and in the JSON of a request."""
    deep: Any = {}
    for _ in range(200):
        deep = {"a": deep}
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": json.dumps(deep)}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "7"},
    ]
    request = {"messages": messages, "max_tokens": 2, "temperature": 0, "seed": 1}
    assert servers.ask("POST", "/v1/chat/completions", request).status in (
        200,
        400,
    )  # too long where it is shown
    for body in (deep, {"messages": deep}, {"messages": [deep]}, {"messages": messages, "tools": [deep]}):
        assert servers.ask("POST", "/v1/chat/completions", body).status in (400, 500)
