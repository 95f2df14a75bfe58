"""Tool calls: how a model writes them is learnt from its own chat template; a grammar sees that it writes them so.

A made-up conversation with two calls is rendered, and what stands around the names and the arguments is the format.
That covers templates that write arguments as JSON (Qwen and Hermes, Llama 3, Mistral, DeepSeek, gpt-oss, Granite and
others); for one that does not, tools are refused. The grammar allows any text until a call begins, and from there on
only calls of the request's tools with arguments that fit their schemas, so that reading them back cannot fail.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashmoe.engines.base import Engine
from flashmoe.errors import ModelError, UsageError
from flashmoe.server.grammar import json_rule
from flashmoe.server.text import held_back

_NAMES = ("flashmoe_first", "flashmoe_second")
_ARGUMENTS = {"flashmoe_argument": "flashmoe_value"}
_WRITTEN = r'\{\s*"flashmoe_argument":\s*"flashmoe_value"\s*\}'


@dataclass(frozen=True)
class Call:
    """A call that the model has made; `arguments` is JSON."""

    name: str
    arguments: str

    def as_dict(self) -> dict[str, Any]:
        """As in OpenAI's messages."""
        return {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


@dataclass(frozen=True)
class Format:
    """Calls are written: open NAME middle ARGUMENTS (between NAME middle ARGUMENTS)* close.

    Where `between` is empty, the model makes one call at a time.
    """

    open: str
    middle: str
    between: str
    close: str

    @property
    def trigger(self) -> str:
        """The beginning of `open` that says that a call comes."""
        found = re.match(r".[^\n{\[]*", self.open, re.DOTALL)
        return found[0] if found else self.open

    def grammar(self, tools: dict[str, dict[str, Any]], *, required: bool, many: bool) -> str:
        """Text and calls of `tools` (name -> schema of the arguments), in llguidance's notation.

        required: a call must come, at once; many: several may.
        """
        quoted = {part: _quoted(getattr(self, part)) for part in ("open", "middle", "between", "close")}
        trigger, rest = _quoted(self.trigger), _quoted(self.open[len(self.trigger) :])
        calls = f"call ({quoted['between']} call)*" if many and self.between else "call"
        lines = [
            "%llguidance {}",
            f"start: {quoted['open']} calls" if required else f"start: TEXT | begin {rest} calls",
            f"calls: {calls} {quoted['close']}",
            "call: " + " | ".join(f"call_{i}" for i in range(len(tools))),
            *(
                f"call_{i}: {_quoted(name)} {quoted['middle']} {json_rule(schema)}"
                for i, (name, schema) in enumerate(tools.items())
            ),
        ]
        if not required:
            lines += [f"begin[lazy]: TEXT {trigger}", r"TEXT: /(.|\n)*/"]
        return "\n".join(lines)

    def read(self, text: str) -> list[Call]:
        """The calls in a text that begins where the trigger does; one that is not complete is left out."""
        calls: list[Call] = []
        decoder, before = json.JSONDecoder(), self.open
        while text.startswith(before):
            name, middle, rest = text[len(before) :].partition(self.middle)
            if not middle:
                break
            try:
                _, end = decoder.raw_decode(rest)
            except ValueError:
                break
            calls.append(Call(name, rest[:end]))
            text, before = rest[end:], self.between
            if not before:
                break
        return calls


def learn_format(engine: Engine) -> Format:
    """How the model's chat template writes calls. Raises ModelError where it does not, or not with JSON."""
    user = {"role": "user", "content": "flashmoe_question"}
    tools = [_tool(name) for name in _NAMES]
    try:
        base = engine.chat_prompt([user], tools=tools)
        one = engine.chat_prompt([user, _answer(1)], tools=tools, answer=False)
    except ModelError:
        base = one = ""
    if _NAMES[0] not in base:
        raise ModelError("the model's chat template takes no tools")
    start = next((i for i, (a, b) in enumerate(zip(base, one, strict=False)) if a != b), len(base))
    first, second = _NAMES
    single = re.fullmatch(f"(.+?){first}(.+?){_WRITTEN}(.*)", one[start:], re.DOTALL)
    if not single:
        raise ModelError("the model's chat template writes tool calls in a way that FlashMoE does not know")
    ends = [engine.piece(t, special=True).decode() for t in range(engine.n_vocab) if engine.is_end(t)]
    close = min((single[3].partition(end)[0] for end in ends if end), key=len).rstrip()
    try:
        two = engine.chat_prompt([user, _answer(2)], tools=tools, answer=False)
    except ModelError:  # one call at a time
        two = ""
    several = re.fullmatch(f".+?{first}.+?{_WRITTEN}(.*?){second}.+?{_WRITTEN}.*", two[start:], re.DOTALL)
    return Format(single[1], single[2], several[1] if several else "", close)


def _answer(calls: int) -> dict[str, Any]:
    """An assistant's message that calls the first of the made-up tools."""
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": f"flash000{i}", "type": "function", "function": {"name": name, "arguments": _ARGUMENTS}}
            for i, name in enumerate(_NAMES[:calls])
        ],
    }


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _tool(name: str) -> dict[str, Any]:
    properties = {"flashmoe_argument": {"type": "string", "description": "flashmoe_text"}}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": name, "description": "flashmoe_text", "parameters": schema},
    }


def schemas(tools: Sequence[dict[str, Any]], only: str | None = None) -> dict[str, dict[str, Any]]:
    """Name -> schema of the arguments, of all tools or of `only` one. Raises UsageError where it is not there."""
    found = {
        tool["function"]["name"]: tool["function"].get("parameters") or {"type": "object"} for tool in tools
    }
    if only is None:
        return found
    if only not in found:
        raise UsageError(f"tool_choice names {only!r}, which is not among the tools")
    return {only: found[only]}


class CallReader:
    """Parts a growing text into what is said and what is called."""

    def __init__(self, form: Format | None) -> None:
        """Without a format, all is said."""
        self._form, self._held, self._calling = form, "", False

    def feed(self, text: str) -> str:
        """What is said of `text`, so far as can be told now."""
        if self._form is None:
            return text
        self._held += text
        if self._calling:
            return ""
        trigger = self._form.trigger
        said, found, _ = self._held.partition(trigger)
        if found:
            self._calling = True
        else:
            said = self._held[: len(self._held) - held_back(self._held, [trigger])]
        self._held = self._held[len(said) :]
        return said

    def end(self) -> tuple[str, list[Call]]:
        """At the end of the text: what is said of the rest, and the calls."""
        if self._form is None or not self._calling:
            return self._held, []
        return "", self._form.read(self._held)
