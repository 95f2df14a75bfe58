"""Programs that people use with such servers, against a real one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel

from tests.server.process import ServerProcess, serving
from tests.serving.test_equal import GEMMA, TOOLS, USER

PROMPT = "Name a colour."
USERS = [{"role": "user", "content": PROMPT}]
DEMO: dict[str, Any] = {"model": "demo"}


@pytest.fixture(scope="module")
def server(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    template = tmp_path_factory.mktemp("template") / "gemma.jinja"
    template.write_text(GEMMA)
    options = ("--cache", "50%", "--parallel", 2, "--temp", 0, "--chat-template-file", template)
    with serving(demo, *options) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def text(client: OpenAI) -> str:
    """The answer to PROMPT, of twelve tokens."""
    answer = client.chat.completions.create(messages=USERS, max_tokens=12, **DEMO)
    assert answer.usage
    assert answer.usage.completion_tokens <= 12
    assert answer.choices[0].message.content
    return answer.choices[0].message.content


class Answer(BaseModel):
    colour: Literal["red", "green"]
    sure: bool


def test_openai_chat(client: OpenAI, text: str) -> None:
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    events = list(client.chat.completions.create(messages=USERS, max_tokens=12, **DEMO, **options))
    assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == text
    assert events[-1].usage
    answer = client.chat.completions.create(
        messages=USERS, max_tokens=4, logprobs=True, top_logprobs=2, **DEMO
    )
    assert answer.choices[0].logprobs
    assert len(answer.choices[0].logprobs.content or []) == 4
    assert len(client.chat.completions.create(messages=USERS, max_tokens=4, n=2, **DEMO).choices) == 2
    assert client.completions.create(prompt="Hello", max_tokens=4, **DEMO).choices[0].text
    assert [model.id for model in client.models.list()] == ["demo"]
    with pytest.raises(BadRequestError):
        client.chat.completions.create(messages=[{"role": "user", "content": "word " * 4000}], **DEMO)


def test_openai_tools(client: OpenAI) -> None:
    request: dict[str, Any] = {
        "messages": [USER],
        "tools": TOOLS,
        "tool_choice": "required",
        "max_tokens": 100,
    }
    request["parallel_tool_calls"] = False
    answer = client.chat.completions.create(**request, **DEMO).choices[0]
    assert answer.finish_reason == "tool_calls"
    call = (answer.message.tool_calls or [])[0]
    assert call.function.name == "weather"  # type: ignore[union-attr]
    with client.chat.completions.stream(**request, **DEMO) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls or []
    assert json.loads(streamed[0].function.arguments)["days"] in (1, 2, 3)  # type: ignore[union-attr]
    result = {"role": "tool", "tool_call_id": call.id, "content": "7 degrees"}
    messages: Any = [USER, answer.message, result]
    assert client.chat.completions.create(messages=messages, max_tokens=8, **DEMO).choices


def test_openai_parses(client: OpenAI) -> None:
    parsed = client.chat.completions.parse(messages=USERS, response_format=Answer, max_tokens=120, **DEMO)
    assert isinstance(parsed.choices[0].message.parsed, Answer)


def test_openai_responses(client: OpenAI, text: str) -> None:
    answer = client.responses.create(input=PROMPT, max_output_tokens=12, **DEMO)
    assert answer.output_text == text
    assert answer.usage
    events = list(client.responses.create(input=PROMPT, max_output_tokens=12, stream=True, **DEMO))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert events[-1].type == "response.completed"
    weather: Any = {"type": "function", "strict": True, **TOOLS[0]["function"]}  # type: ignore[dict-item]
    request: dict[str, Any] = {"tools": [weather], "tool_choice": "required", "max_output_tokens": 100}
    called = client.responses.create(input=str(USER["content"]), **request, **DEMO)
    assert "function_call" in {item.type for item in called.output}


@pytest.mark.xfail(strict=True, reason="llama.cpp does not heed text.format of a response")
def test_openai_responses_of_a_form(client: OpenAI) -> None:
    form: Any = {"type": "json_schema", "name": "answer", "schema": Answer.model_json_schema()}
    formed = client.responses.create(input=PROMPT, text={"format": form}, max_output_tokens=120, **DEMO)
    assert Answer.model_validate_json(formed.output_text)


@pytest.mark.xfail(strict=True, reason="llama.cpp's events have no output_index, which this helper wants")
def test_openai_responses_put_together(client: OpenAI, text: str) -> None:
    with client.responses.stream(input=PROMPT, max_output_tokens=12, **DEMO) as stream:
        assert stream.get_final_response().output_text == text


def test_anthropic(server: ServerProcess, text: str) -> None:
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        request: dict[str, Any] = {**DEMO, "messages": USERS, "max_tokens": 12}
        answer = client.messages.create(**request)
        assert (answer.content[0].text, answer.usage.output_tokens) == (
            text,
            12,
        ) or answer.stop_reason == "end_turn"
        with client.messages.stream(**request) as stream:
            assert "".join(stream.text_stream) == text
            assert stream.get_final_message().usage.output_tokens == answer.usage.output_tokens
        counted = client.messages.count_tokens(model="demo", messages=USERS)
        assert counted.input_tokens == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
        weather = {"name": "weather", "input_schema": TOOLS[0]["function"]["parameters"]}  # type: ignore[index]
        choice = {"type": "any"}
        asked = {**request, "messages": [USER], "max_tokens": 100, "tools": [weather], "tool_choice": choice}
        called = client.messages.create(**asked)
        block = next(block for block in called.content if block.type == "tool_use")
        assert block.name == "weather"
        assert block.input["days"] in (1, 2, 3)
        with client.messages.stream(**asked) as stream:
            assert stream.get_final_message().content[0].input["days"] in (1, 2, 3)
        result = {"type": "tool_result", "tool_use_id": block.id, "content": "7 degrees"}
        history = [USER, {"role": "assistant", "content": [block]}, {"role": "user", "content": [result]}]
        assert client.messages.create(**{**request, "messages": history}).content is not None
        with pytest.raises(anthropic.BadRequestError):
            client.messages.create(**{**request, "messages": [{"role": "user", "content": "word " * 4000}]})


#: In a process of its own: it takes seconds to import, and sets a lot up in whatever imports it.
LITELLM = """
import json, sys
import litellm
url, tools = sys.argv[1], json.loads(sys.argv[2])
messages = [{"role": "user", "content": sys.argv[3]}]
found = {}
for name, base in (("openai/demo", url + "/v1"), ("hosted_vllm/demo", url + "/v1"), ("anthropic/demo", url)):
    request = {"model": name, "api_base": base, "api_key": "none", "messages": messages}
    whole = litellm.completion(**request, max_tokens=12)
    pieces = [e.choices[0].delta.content or "" for e in litellm.completion(**request, max_tokens=12, stream=True)]
    called = litellm.completion(**request, max_tokens=60, tools=tools, tool_choice="required")
    calls = [call.function.name for call in called.choices[0].message.tool_calls or []]
    found[name] = [whole.choices[0].message.content, "".join(pieces), calls[:1]]
print(json.dumps(found))
"""


def test_litellm(server: ServerProcess, text: str) -> None:
    env = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # nothing from the network
    command = [sys.executable, "-c", LITELLM, server.url, json.dumps(TOOLS), PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    if "No module named 'litellm'" in done.stderr:
        pytest.skip("litellm is not installed")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(map(json.dumps, found.values())) == {json.dumps([text, text, ["weather"]])}


@pytest.fixture(scope="module")
def node_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("there is no node")
    folder = tmp_path_factory.mktemp("node")
    shutil.copy(Path(__file__).with_name("client.mjs"), folder)
    options = ["--no-audit", "--no-fund", "--prefer-offline", "--fetch-retries=0", "--fetch-timeout=20000"]
    packages = ["ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible"]
    command = ["npm", "install", *options, *packages]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"npm cannot install the AI SDK: {done.stderr.strip()[:200]}")
    return folder / "client.mjs"


def test_ai_sdk(node_client: Path, server: ServerProcess, text: str) -> None:
    command = ["node", str(node_client), f"{server.url}/v1"]
    done = subprocess.run(command, cwd=node_client.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for name in ("chat", "responses", "compatible"):
        assert (found[name]["whole"], found[name]["streamed"]) == (text, text)
        assert 0 < found[name]["tokens"] <= 12
    for name in ("chat", "compatible"):
        tool, arguments = found[name]["calls"][0]
        assert (tool, arguments["days"] in (1, 2)) == ("weather", True)
