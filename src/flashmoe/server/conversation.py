"""From a chat request to what the engine runs: the prompt, the rules, and how tool calls are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flashmoe.engines.base import Engine
from flashmoe.errors import UsageError
from flashmoe.generation import Rule
from flashmoe.server.grammar import Grammars, json_grammar
from flashmoe.server.rules import Bias, Penalties
from flashmoe.server.schema import ChatRequest, Message, SamplingFields
from flashmoe.server.tools import Format, learn_format, schemas


@dataclass(frozen=True)
class Prepared:
    """A request, ready to run. Every choice takes fresh `rules()`."""

    prompt: list[int]
    rules: Callable[[], list[Rule]]
    form: Format | None = None


class Preparer:
    """Prepares the requests for one model. Thread-safe: it only reads the engine's vocabulary and template."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self._engine)

    @cached_property
    def _format(self) -> Format:
        return learn_format(self._engine)

    def chat(self, request: ChatRequest) -> Prepared:
        """Raises UsageError and ModelError where the model cannot do what is asked."""
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools or []]
        if request.tool_choice == "none":
            tools = []
        elif not tools and request.tool_choice not in (None, "auto"):
            raise UsageError("tool_choice needs tools")
        form = self._format if tools else None
        grammar = self._grammar(request, tools, form)
        text = self._engine.chat_prompt(_messages(request.messages), tools=tools or None)
        tokens = self._engine.tokenize(text, special=True)
        rules = self._rules(request, grammar)
        rules()  # a grammar that cannot be used is refused here
        return Prepared(tokens, rules, form)

    def text(self, request: SamplingFields, prompt: str | Sequence[int]) -> Prepared:
        """A plain prompt, text or token ids. Raises UsageError."""
        return Prepared(self.tokens(prompt), self._rules(request, None))

    def tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """Raises UsageError for ids that the model does not have."""
        if isinstance(prompt, str):
            return self._engine.tokenize(prompt)
        if any(token >= self._engine.n_vocab for token in prompt):
            raise UsageError(f"token ids must be below {self._engine.n_vocab}")
        return list(prompt)

    def _grammar(self, request: ChatRequest, tools: list[dict[str, Any]], form: Format | None) -> str | None:
        wanted = request.response_format
        if wanted and wanted.type != "text":
            if tools:
                raise UsageError("response_format and tools cannot be used together")
            schema: dict[str, Any] | None = {"type": "object"}
            if wanted.type == "json_schema":
                schema = wanted.json_schema.json_schema if wanted.json_schema else None
            if schema is None:
                raise UsageError("response_format of type json_schema needs json_schema.schema")
            return json_grammar(schema)
        if not form:
            return None
        choice = request.tool_choice
        named = None if choice is None or isinstance(choice, str) else choice.function.name
        return form.grammar(
            schemas(tools, named),
            required=named is not None or choice == "required",
            many=named is None and request.parallel_tool_calls is not False,
        )

    def _rules(self, request: SamplingFields, grammar: str | None) -> Callable[[], list[Rule]]:
        bias = request.logit_bias or {}
        if any(token >= self._engine.n_vocab for token in bias):
            raise UsageError(f"logit_bias: token ids must be below {self._engine.n_vocab}")
        frequency, presence = request.frequency_penalty or 0.0, request.presence_penalty or 0.0

        def make() -> list[Rule]:
            rules: list[Rule] = []
            if bias:
                rules.append(Bias(bias))
            if frequency or presence:
                rules.append(Penalties(frequency, presence))
            if grammar:
                rules.append(self._grammars.make(grammar))
            return rules

        return make


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As chat templates want them: content is text, arguments are objects. Raises UsageError."""
    return [_message(message) for message in messages]


def _message(message: Message) -> dict[str, Any]:
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content or [])
    out = {**message.model_dump(exclude_none=True), "content": text}
    for call in out.get("tool_calls", []):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        except ValueError:
            raise UsageError("the arguments of a tool call in the messages are not JSON") from None
    return out
