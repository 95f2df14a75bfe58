"""The official client against a real server process."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.cli.runner import own_process
from tests.server.process import serving

MODEL = "demo-tools"
QUESTION: Any = [{"role": "user", "content": "What is a mixture of experts?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Oslo", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
FLAT: Any = {"extra_body": {"top_k": 0, "min_p": 0.0}}  # any token may come
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "flashmoe"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=24, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    usage: Any = answer.usage
    assert usage.completion_tokens == 24
    assert usage.total_tokens == usage.prompt_tokens + 24
    assert 0 < usage.flashmoe["hit_rate"] <= 1
    assert usage.flashmoe["hits"] + usage.flashmoe["misses"] > 0
    assert usage.flashmoe["bytes_read"] % 1024 == 0


def test_stream_says_what_the_whole_answer_says(client: OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 24, "seed": 5, "temperature": 1.5}
    whole = client.chat.completions.create(**options)
    events = list(
        client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options)
    )
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"
    assert events[-1].usage
    assert whole.usage
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({event.id for event in events}) == 1


@pytest.mark.parametrize(
    "sampling", [{"temp": 0}, {"temp": 1.3, "seed": 11}, {"temp": 0.7, "seed": 2, "top-p": 0.5}]
)
def test_tokens_are_those_of_run(client: OpenAI, tool_model: Path, sampling: dict[str, float]) -> None:
    prompt = "The history of the lighthouse"
    arguments = [item for name, value in sampling.items() for item in (f"--{name}", value)]
    run = own_process("run", tool_model, "-p", prompt, "-n", 32, "--cache", "20%", "-t", 1, "-q", *arguments)
    names = {"temp": "temperature", "seed": "seed", "top-p": "top_p"}
    options: Any = {names[name]: value for name, value in sampling.items()}

    def ask(_: int) -> str:
        return client.completions.create(model=MODEL, prompt=prompt, max_tokens=32, **options).choices[0].text

    with ThreadPoolExecutor(4) as pool:  # three take turns, one waits
        texts = list(pool.map(ask, range(4)))
    assert {text.rstrip("\n") for text in texts} == {run.out.rstrip("\n")}


def test_chat_is_that_of_run(client: OpenAI, tool_model: Path) -> None:
    run = own_process(
        "run",
        tool_model,
        "--chat",
        "-p",
        QUESTION[0]["content"],
        "-n",
        24,
        "--temp",
        0,
        "--cache",
        "20%",
        "-t",
        1,
        "-q",
    )
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=24, temperature=0)
    assert (answer.choices[0].message.content or "").rstrip("\n") == run.out.rstrip("\n")


def test_prompt_forms(client: OpenAI) -> None:
    options: Any = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    one = client.completions.create(prompt="The sea", **options).choices[0].text
    several = client.completions.create(prompt=["The sea", "The moon"], **options)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == one
    ids = client.completions.create(prompt=[5, 6, 7], **options)
    assert ids.usage
    assert ids.usage.prompt_tokens == 3
    assert ids.choices[0].text == client.completions.create(prompt=[[5, 6, 7]], **options).choices[0].text


def test_several_choices(client: OpenAI) -> None:
    options: Any = {
        "model": MODEL,
        "messages": QUESTION,
        "max_tokens": 12,
        "temperature": 3,
        "seed": 3,
        **FLAT,
    }
    texts = [c.message.content for c in client.chat.completions.create(n=3, **options).choices]
    assert len(set(texts)) > 1
    assert [c.message.content for c in client.chat.completions.create(n=3, **options).choices] == texts
    parts = ["", "", ""]
    for event in client.chat.completions.create(n=3, stream=True, **options):
        parts[event.choices[0].index] += event.choices[0].delta.content or ""
    assert parts == texts


def test_stop_strings(client: OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 40, "temperature": 0}
    text = client.chat.completions.create(**options).choices[0].message.content or ""
    stop = text[20:26]  # in the middle of tokens
    answer = client.chat.completions.create(stop=["never said", stop], **options)
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage
    assert answer.usage.completion_tokens < 40
    streamed = client.chat.completions.create(stop=stop, stream=True, **options)
    assert "".join(e.choices[0].delta.content or "" for e in streamed) == text[: text.index(stop)]


def test_logprobs(client: OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 8, "temperature": 0}
    choice = client.chat.completions.create(logprobs=True, top_logprobs=3, **options).choices[0]
    assert choice.logprobs
    content = choice.logprobs.content or []
    assert "".join(entry.token for entry in content) == choice.message.content
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy
        assert sum(math.exp(other.logprob) for other in entry.top_logprobs) <= 1 + 1e-9
    text = client.completions.create(
        model=MODEL, prompt="The sea", max_tokens=5, logprobs=2, temperature=0
    ).choices[0]
    assert text.logprobs
    assert "".join(text.logprobs.tokens or []) == text.text
    assert [len(top) for top in text.logprobs.top_logprobs or []] == [2] * 5


def test_bias_and_penalties(client: OpenAI) -> None:
    options: Any = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "logprobs": 0}

    def tokens(**more: Any) -> list[str]:
        logprobs = client.completions.create(**options, **more).choices[0].logprobs
        return (logprobs.tokens if logprobs else None) or []

    assert set(tokens(logit_bias={"65": 100})) == {tokens(logit_bias={"65": 100})[0]}
    forced = tokens(logit_bias={"65": 50, "66": 49.5}, frequency_penalty=2)
    assert len(set(forced)) == 2


def test_json_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "green"]},
            "size": {"type": "integer", "minimum": 0, "maximum": 20},
        },
        "required": ["colour", "size"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    for seed in range(5):
        answer = client.chat.completions.create(
            model=MODEL, messages=QUESTION, response_format=form, seed=seed, temperature=2, max_tokens=200
        )
        thing = json.loads(answer.choices[0].message.content or "")
        assert set(thing) == {"colour", "size"}
        assert thing["colour"] in ("red", "green")
        assert 0 <= thing["size"] <= 20
        assert answer.choices[0].finish_reason == "stop"


def test_schema_that_makes_no_sense(client: OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError, match="nothing"):
        client.chat.completions.create(model=MODEL, messages=QUESTION, response_format=form)


def test_required_tool_call(client: OpenAI) -> None:
    for seed in range(4):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            tools=[WEATHER, CLOCK],
            tool_choice="required",
            parallel_tool_calls=False,
            seed=seed,
            max_tokens=200,
        )
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert call.function.name in ("weather", "clock")
        arguments = json.loads(call.function.arguments)
        if call.function.name == "weather":
            assert arguments["city"] in ("Oslo", "Rome")
            assert 1 <= arguments["days"] <= 9
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.choices[0].message.content is None


def test_named_tool_streamed_and_answered(client: OpenAI) -> None:
    options: Any = {
        "model": MODEL,
        "tools": [WEATHER, CLOCK],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "max_tokens": 200,
        "seed": 1,
    }
    whole = client.chat.completions.create(messages=QUESTION, **options).choices[0].message
    events = list(client.chat.completions.create(messages=QUESTION, stream=True, **options))
    calls = [call for event in events for call in event.choices[0].delta.tool_calls or []]
    assert [call.index for call in calls] == [0]
    assert calls[0].function
    assert whole.tool_calls
    assert calls[0].function.arguments == whole.tool_calls[0].function.arguments
    assert events[-1].choices[0].finish_reason == "tool_calls"
    result: Any = {"role": "tool", "tool_call_id": whole.tool_calls[0].id, "content": "sunny"}
    answer = client.chat.completions.create(
        model=MODEL, messages=[*QUESTION, whole, result], tools=[WEATHER], max_tokens=5, tool_choice="none"
    )
    assert answer.usage
    assert answer.usage.completion_tokens <= 5


def test_model_may_answer_in_words_although_there_are_tools(client: OpenAI) -> None:
    options: Any = {
        "model": MODEL,
        "messages": QUESTION,
        "tools": [WEATHER],
        "max_tokens": 16,
        "temperature": 0,
    }
    message = client.chat.completions.create(**options).choices[0].message
    assert message.content
    assert not message.tool_calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "role"),
        ({"messages": QUESTION, "temperature": -1}, "temperature"),
        ({"messages": QUESTION, "max_tokens": -5}, "max_tokens"),
        ({"messages": QUESTION, "logit_bias": {"999999": 1}}, "logit_bias"),
        ({"messages": QUESTION, "tool_choice": "required"}, "tool_choice needs tools"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "the context 512"),
    ],
)
def test_mistakes(client: OpenAI, options: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.chat.completions.create(model=MODEL, **options)
    assert caught.value.type == "invalid_request_error"
    if "context" in message:
        assert caught.value.code == "context_length_exceeded"


def test_shared_beginning_is_reused_and_changes_nothing(tool_model: Path) -> None:
    words = " ".join(f"word{i}" for i in range(30))
    with serving(tool_model, "--cache", "50%", "--parallel", 1, "-ub", 16) as small, small.client() as other:
        options: Any = {"model": MODEL, "max_tokens": 8, "temperature": 0}
        first = other.completions.create(prompt=words, **options)
        again = other.completions.create(prompt=f"{words} and then", **options)
        other.completions.create(prompt="Something else", **options)
        anew = other.completions.create(prompt=f"{words} and then", **options)
    assert first.usage
    assert again.usage
    assert anew.usage
    assert again.usage.prompt_tokens_details
    cached = again.usage.prompt_tokens_details.cached_tokens or 0
    assert 0 < cached < again.usage.prompt_tokens
    assert cached % 16 == 0
    assert anew.usage.prompt_tokens_details
    assert anew.usage.prompt_tokens_details.cached_tokens == 0
    assert again.choices[0].text == anew.choices[0].text
