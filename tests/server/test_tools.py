"""Formats of tool calls, learnt from templates in the styles of several families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from llguidance import LLMatcher

from flashmoe.engines.llamacpp.template import render_chat
from flashmoe.errors import ModelError
from flashmoe.server.text import TextStream, held_back
from flashmoe.server.tools import Call, CallReader, Format, learn_format
from tests.server.conftest import HERMES

TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
TURN = "{% for m in messages %}{% if m.role == 'user' %}[U]{{ m.content }}{% else %}"
LLAMA = (
    TOOLS
    + TURN
    + (
        "<|assistant|>{% if m.tool_calls | length > 1 %}{{ raise_exception('one call only') }}{% endif %}"
        "{% set f = m.tool_calls[0].function %}"
        "{{ '{\"name\": \"' + f.name + '\", \"parameters\": ' + (f.arguments | tojson) + '}<|eot|>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
)
MISTRAL = (
    TOOLS
    + TURN
    + (
        "[TOOL_CALLS][{% for c in m.tool_calls %}"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
        "{% if not loop.last %}, {% endif %}{% endfor %}]<|eot|>{% endif %}{% endfor %}"
    )
)
HARMONY = (
    TOOLS
    + TURN
    + (
        "{% for c in m.tool_calls %}<|start|>assistant to=functions.{{ c.function.name }}<|channel|>commentary json"
        "<|message|>{{ c.function.arguments | tojson }}<|eot|>{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
)
XML = (
    TOOLS
    + TURN
    + (
        "{% for c in m.tool_calls %}<function={{ c.function.name }}>{% for k, v in c.function.arguments.items() %}"
        "<parameter={{ k }}>{{ v }}</parameter>{% endfor %}</function>{% endfor %}<|eot|>{% endif %}{% endfor %}"
    )
)


class Engine:
    """A template and one end token."""

    n_vocab = 1

    def __init__(self, template: str) -> None:
        self._template = template

    def chat_prompt(self, messages: Sequence[dict[str, Any]], tools: Any = None, answer: bool = True) -> str:
        return render_chat(self._template, messages, tools=tools, answer=answer, bos="", eos="")

    def piece(self, token: int, special: bool = False) -> bytes:
        return b"<|endoftext|>" if "endoftext" in self._template else b"<|eot|>"

    def is_end(self, token: int) -> bool:
        return True


@pytest.mark.parametrize(
    ("template", "trigger", "written"),
    [
        (HERMES, "<tool_call>", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'),
        (LLAMA, '{"name": "', '{"name": "f", "parameters": {"a": 1}}'),
        (MISTRAL, "[TOOL_CALLS]", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]'),
        (HARMONY, " to=functions.", ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}'),
    ],
)
def test_formats(template: str, trigger: str, written: str) -> None:
    form = learn_format(Engine(template))  # type: ignore[arg-type]
    assert form.trigger == trigger
    assert form.open + "f" + form.middle + '{"a": 1}' + form.close == written
    assert form.read(written) == [Call("f", '{"a": 1}')]
    for required in (True, False):
        grammar = form.grammar({"f": {"type": "object"}, "g": {}}, required=required, many=True)
        assert LLMatcher.validate_grammar(grammar) == ""


def test_several_calls() -> None:
    form = learn_format(Engine(MISTRAL))  # type: ignore[arg-type]
    text = '[TOOL_CALLS][{"name": "f", "arguments": {"a": "]"}}, {"name": "g", "arguments": {}}]'
    assert form.read(text) == [Call("f", '{"a": "]"}'), Call("g", "{}")]
    for cut in range(len(text)):
        assert form.read(text[:cut]) == form.read(text)[: len(form.read(text[:cut]))]
    assert not learn_format(Engine(LLAMA)).between  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "message"), [(XML, "does not know"), (TURN + "{% endif %}{% endfor %}", "takes no tools")]
)
def test_templates_without_json_calls(template: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        learn_format(Engine(template))  # type: ignore[arg-type]


def test_what_is_said_before_a_call() -> None:
    form = Format("<call>", " ", "", "</call>")
    text = 'Let me <see>. <call>f {"a": 1}</call>'
    for size in (1, 2, 3, 7, 100):
        reader = CallReader(form)
        said = "".join(reader.feed(text[i : i + size]) for i in range(0, len(text), size))
        rest, calls = reader.end()
        assert said + rest == "Let me <see>. "
        assert calls == [Call("f", '{"a": 1}')]
    reader = CallReader(form)
    assert reader.feed("a <ca") == "a "
    assert reader.end() == ("<ca", [])


def test_held_back() -> None:
    assert held_back("abc", ["cd", "bcx"]) == 2
    assert held_back("abc", ["abc"]) == 0
    assert held_back("abc", []) == 0
    assert TextStream(lambda _: b"", ["x"]).flush() == ("", [])
