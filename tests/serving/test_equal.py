"""The server over the pool answers what the stock server out of the same wheel answers, to the last bit.

Both are asked the same, one after the other; texts, token ids, probabilities, counts of tokens (those found in a
slot among them), calls of tools, and refusals must be the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import flashmoe
from flashmoe.engines.llamacpp.library import Library
from tests.conftest import Tiny
from tests.serving.reference import Pair, pair, shared

USER = {"role": "user", "content": "Name a colour, and say why you like it."}
GREEDY = {"temperature": 0, "seed": 1}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2, 3]}},
                "required": ["city", "days"],
            },
        },
    }
]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}, "likes": {"type": "boolean"}},
    "required": ["colour", "likes"],
    "additionalProperties": False,
}


#: Qwen's way of calling tools and of thinking, and Gemma's, whose grammar lets nothing stand before a required call.
QWEN = """{%- if tools %}<|system|>
Tools: {% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call them with <tool_call>
{"name": NAME, "arguments": {}}
</tool_call><|endoftext|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}<|user|>
<tool_response>
{{ m.content }}
</tool_response><|endoftext|>
{% elif m.role == 'assistant' %}<|assistant|>
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|endoftext|>
{% else %}<|{{ m.role }}|>
{{ m.content }}<|endoftext|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
GEMMA = """{%- for tool in tools or [] %}<|tool>declaration:{{ tool.function | tojson }}<tool|>{% endfor %}
{%- for m in messages %}
{%- if m.role == 'tool' %}<|tool_response>response:{{ m.content }}<tool_response|>
{%- else %}<|turn>{{ m.role }}
{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}<|tool_call>call:{{ call.function.name }}
{{- call.function.arguments | tojson }}<tool_call|>
{%- endfor %}<turn|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|turn>model
{% endif %}"""


def load(path: Path, lib: Library, **options: Any) -> flashmoe.Model:
    return flashmoe.load(path, library=lib, **{"threads": 1, "parallel": 4, "layout": "plain", **options})


@pytest.fixture(scope="module", params=["plain", "repacked"])
def servers(request: pytest.FixtureRequest, demo: Path, lib: Library) -> Iterator[Pair]:
    with load(demo, lib, cache="40%", layout=request.param) as model, pair(model) as both:
        yield both


def test_text_ids_and_probabilities(servers: Pair) -> None:
    answer = servers.post(
        "/completion",
        {"prompt": "Once upon a time", "n_predict": 24, "n_probs": 3, "return_tokens": True, **GREEDY},
    )
    assert len(answer["tokens"]) == len(answer["completion_probabilities"]) > 0
    for sampling in (
        {"temperature": 0.9, "seed": 7, "top_k": 20},
        {"mirostat": 2, "seed": 3},
        {"dry_multiplier": 0.8, "xtc_probability": 0.5, "min_p": 0.01, "temperature": 1.2, "seed": 5},
    ):
        answer = servers.post("/completion", {"prompt": "The sky", "n_predict": 16, "n_probs": 3, **sampling})
        assert answer["tokens_predicted"] > 1


def test_chat(servers: Pair) -> None:
    request = {"messages": [USER], "max_tokens": 24, "logprobs": True, "top_logprobs": 3, **GREEDY}
    answer = servers.post("/v1/chat/completions", request)
    assert len(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 3
    events = servers.post("/v1/chat/completions", {**request, "stream": True})
    text = "".join(
        choice["delta"].get("content") or ""
        for event in events[:-1]
        for choice in event["choices"]
        if event != "[DONE]"
    )
    assert text == answer["choices"][0]["message"]["content"]
    servers.post("/v1/completions", {"prompt": "Hello", "max_tokens": 8, "logprobs": 3, **GREEDY})
    servers.post("/v1/messages", {"messages": [USER], "max_tokens": 8, **GREEDY})
    servers.post("/v1/responses", {"input": "Hello", "max_output_tokens": 8, **GREEDY})


@pytest.mark.parametrize("layout", ["plain", "repacked"])
def test_calls_of_tools(demo: Path, lib: Library, layout: str) -> None:
    request = {"messages": [USER], "tools": TOOLS, "tool_choice": "required", "max_tokens": 100, **GREEDY}
    with load(demo, lib, cache="40%", layout=layout) as model, pair(model, chat_template=GEMMA) as both:
        message = both.post("/v1/chat/completions", request)["choices"][0]["message"]
        call = message["tool_calls"][0]
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"])["days"] in (1, 2, 3)
        result = {"role": "tool", "tool_call_id": call["id"], "content": "7 degrees"}
        follow = {"messages": [USER, message, result], "tools": TOOLS, "max_tokens": 8, **GREEDY}
        both.ask("POST", "/v1/chat/completions", follow)  # a small model's answer may have no known form
        both.post("/v1/chat/completions", {**request, "stream": True})
        both.post("/v1/chat/completions", {**request, "parallel_tool_calls": True})
        anthropic = [{"name": "weather", "input_schema": TOOLS[0]["function"]["parameters"]}]
        asked = {"messages": [USER], "tools": anthropic, "tool_choice": {"type": "any"}, "max_tokens": 120}
        blocks = both.post("/v1/messages", {**asked, **GREEDY})["content"]
        assert "tool_use" in {block["type"] for block in blocks}


def test_thoughts(demo: Path, lib: Library) -> None:
    with load(demo, lib, cache="40%") as model, pair(model, chat_template=QWEN) as both:
        for kind in ("none", "auto", "deepseek"):
            for enabled in (True, False):
                arguments = {"enable_thinking": enabled}
                request = {"messages": [USER], "max_tokens": 12, "reasoning_format": kind, **GREEDY}
                both.post("/v1/chat/completions", {**request, "chat_template_kwargs": arguments})
        begun = {"role": "assistant", "content": "<think>\nIt is"}
        both.post("/v1/chat/completions", {"messages": [USER, begun], "max_tokens": 12, **GREEDY})
        both.post("/v1/chat/completions", {"messages": [USER], "tools": TOOLS, "max_tokens": 12, **GREEDY})


def test_schema(servers: Pair) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    answer = servers.post(
        "/v1/chat/completions", {"messages": [USER], "response_format": form, "max_tokens": 64, **GREEDY}
    )
    assert '"colour"' in answer["choices"][0]["message"]["content"]
    servers.post("/completion", {"prompt": "x", "grammar": 'root ::= "a" [b-z]{4}', "n_predict": 8, **GREEDY})


def test_refusals(servers: Pair) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}),
        ("/v1/chat/completions", {}),
        ("/completion", {"prompt": "word " * 4000}),
        ("/completion", {"prompt": "a", "grammar": "root ::= ("}),
        ("/v1/embeddings", {"input": "a"}),
        ("/nothing", {}),
    ):
        assert servers.ask("POST", path, body).status >= 400


def test_other_routes(servers: Pair) -> None:
    tokens = servers.post("/tokenize", {"content": "Hello <|im_end|> world", "parse_special": True})
    servers.post("/detokenize", tokens)
    servers.post("/apply-template", {"messages": [USER], "tools": TOOLS})
    servers.post("/v1/chat/completions/input_tokens", {"messages": [USER]})
    servers.post("/v1/messages/count_tokens", {"messages": [USER]})
    # llama.cpp's model alone counts its bytes of experts
    assert servers.ask("GET", "/v1/models").status == servers.ask("GET", "/health").status == 200


def converse(servers: Pair, turns: int = 3, **request: Any) -> list[int]:
    """A conversation with both; how many tokens of each prompt were there already."""
    messages: list[Any] = [{"role": "system", "content": "Be brief."}]
    found = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{turn}: tell me more of the sky"})
        answer = servers.post(
            "/v1/chat/completions", {"messages": messages, "max_tokens": 8, **GREEDY, **request}
        )
        found.append(answer["timings"]["cache_n"])
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == found[-1]
        messages.append(answer["choices"][0]["message"])
    # an earlier message is another one: what was made of the rest cannot be used
    messages[1] = {"role": "user", "content": "0: tell me less"}
    answer = servers.post("/v1/chat/completions", {"messages": messages[:-1], "max_tokens": 4, **GREEDY})
    found.append(answer["timings"]["cache_n"])
    return found


def test_turns(servers: Pair) -> None:
    found = converse(servers)
    assert found[1] > 10
    assert found[2] > found[1]


def test_two_conversations_in_turns(servers: Pair) -> None:
    for turn in range(3):
        for topic in ("a ship at sea", "a garden"):
            messages = [{"role": "user", "content": f"Tell me of {topic}." + " And more." * turn}]
            servers.post("/v1/chat/completions", {"messages": messages, "max_tokens": 6, **GREEDY})


@pytest.mark.parametrize("cache", ["1", "10%", "100%"])
@pytest.mark.parametrize("layout", ["plain", "repacked"])
def test_pools(demo: Path, lib: Library, cache: str, layout: str) -> None:
    with load(demo, lib, cache=cache, layout=layout) as model, pair(model) as both:
        converse(both, turns=2, logprobs=True, top_logprobs=3)
        batch(both)


def batch(servers: Pair) -> None:
    """Several answers at once, of which both servers evaluate the same batches."""
    prompts = ["The sky is", "The sea was", "My cat can", "A dog will"]
    request = {"n_predict": 8, "n_probs": 2, "return_tokens": True, **GREEDY}
    answers = servers.post("/completion", {"prompt": prompts, **request})
    assert len(answers) == len(prompts)
    servers.post("/completion", {"prompt": ["a", "b b b b", "c " * 20, "d"], **request})
    if servers.inner.parallel > 1:
        servers.post("/completion", {"prompt": "Once", "n_cmpl": 4, **request, "temperature": 1.0})
        chat = {"messages": [USER], "n": 3, "max_tokens": 8, "seed": 9, "logprobs": True}
        assert len(servers.post("/v1/chat/completions", chat)["choices"]) == 3


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", ["plain", "repacked"])
def test_batches(demo: Path, lib: Library, threads: int, layout: str) -> None:
    for cache in ("20%", "60%"):
        with load(demo, lib, cache=cache, layout=layout, threads=threads) as model, pair(model) as both:
            batch(both)


ATTENTION = ["llama", "gpt-oss", "gemma4", "deepseek2", "glm4moe", "llama4", "grovemoe"]
RECURRENT = ["qwen3next", "lfm2moe", "nemotron_h_moe", "jamba"]


@pytest.mark.parametrize("cache", ["1", "50%"])
@pytest.mark.parametrize("name", ATTENTION + RECURRENT)
def test_architectures(tiny: Tiny, lib: Library, name: str, cache: str) -> None:
    """Chat, with what earlier turns have left; and a batch."""
    with ExitStack() as stack:
        both = stack.enter_context(pair(stack.enter_context(load(tiny(name), lib, cache=cache))))
        found = converse(both, turns=3, logprobs=True, top_logprobs=3)
        batch(both)
    assert found[0] == 0
    assert name in RECURRENT or found[1] > 10


@pytest.mark.parametrize("name", RECURRENT)
def test_checkpoints(tiny: Tiny, lib: Library, name: str) -> None:
    """Memories that cannot be cut go back to the same checkpoints, at several sizes of micro-batches."""
    for n_ubatch in (512, 32):
        with load(tiny(name), lib, cache="60%", parallel=2, n_ubatch=n_ubatch) as model:
            assert model._server_options
            assert model._server_options.ctx_checkpoints > 0
            with pair(model) as both:
                long = [{"role": "user", "content": "one two three " * 12}]
                for tail in ("a", "b", "a"):
                    messages = [*long, {"role": "user", "content": tail}]
                    both.post("/v1/chat/completions", {"messages": messages, "max_tokens": 4, **GREEDY})
                found = converse(both, turns=3)
    assert found[2] > 0


# llama.cpp's Kimi-Linear aborts where a micro-batch is no multiple of the sequences: it gets a whole pool
OTHERS = [("kimi-linear", "100%"), ("granitehybrid", "60%"), ("qwen35moe", "60%"), ("glm-dsa", "60%")]


@pytest.mark.parametrize(("name", "cache"), OTHERS)
def test_other_architectures(name: str, cache: str, tmp_path: Path, lib: Library) -> None:
    """Of the generator beside the checkout."""
    generator = shared("archs", "models.py")
    if not generator.is_file():
        pytest.skip("the generator of tiny models beside the checkout is not there")
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import models; "
        "models.FOLDER = pathlib.Path(sys.argv[2]); models.generate(sys.argv[3])"
    )
    command = [sys.executable, "-c", code, str(generator.parent), str(tmp_path), name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with load(tmp_path / f"{name}.gguf", lib, cache=cache) as model, pair(model) as both:
        converse(both, turns=3, logprobs=True, top_logprobs=3)
        batch(both)
