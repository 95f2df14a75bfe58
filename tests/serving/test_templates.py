"""Every chat template of the collection beside the checkout: our server makes the same prompts and answers of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import flashmoe
from flashmoe.engines.llamacpp.library import Library
from flashmoe.engines.llamacpp.serving.options import ServerOptions
from flashmoe.errors import ModelError
from tests.models.architectures import ATTN, MOE
from tests.models.spec import Spec
from tests.models.writer import write
from tests.serving.copies import copy
from tests.serving.reference import StockServer, pair, shared

# several programs ship the same template
FOUND = {path.read_bytes(): path for path in shared("chat-templates").glob("*.jinja")}
TEMPLATES = sorted(FOUND.values())
USER = {"role": "user", "content": "What is the weather in Graz?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Graz"}'},
}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "7 degrees"}
REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [USER]},
    "two turns": {"messages": [SYSTEM, USER, {"role": "assistant", "content": "Rain."}, USER]},
    "thinks": {"messages": [USER], "chat_template_kwargs": {"enable_thinking": True}},
    "does not think": {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}},
    "thought": {
        "messages": [USER, {"role": "assistant", "content": "Rain.", "reasoning_content": "Hm."}, USER]
    },
    "tools": {"messages": [SYSTEM, USER], "tools": [TOOL]},
    "call and result": {"messages": [USER, CALLED, RESULT], "tools": [TOOL]},
}


#: One layer and one head: with a token a byte, prompts have thousands, and attention is nearly all that they cost.
SMALL = Spec(
    "llama",
    "for long prompts",
    (ATTN + MOE,),
    sizes="H=1 J=1 K=32",
    keys="context_length=16384 feed_forward_length=96",
    chat=True,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, lib: Library) -> Iterator[flashmoe.Model]:
    """With room for long prompts, and an end that is no beginning."""
    folder = tmp_path_factory.mktemp("templates")
    write(SMALL, "small", folder / "small.gguf")
    path = copy(folder / "small.gguf", folder / "copy.gguf", tokenizer__ggml__bos_token_id=257)
    with flashmoe.load(
        path, cache="100%", parallel=1, threads=1, layout="plain", n_ctx=16384, n_ubatch=512, library=lib
    ) as loaded:
        yield loaded


def check_refusal(model: flashmoe.Model, options: ServerOptions, message: str) -> None:
    """In one line, and only where the stock server does not start."""
    assert re.fullmatch(r".*template.*", message)
    with pytest.raises(RuntimeError):
        StockServer(model, options)


@pytest.mark.skipif(not TEMPLATES, reason="the collection of templates beside the checkout is not there")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_template(model: flashmoe.Model, path: Path) -> None:
    assert model._server_options
    options = replace(model._server_options, chat_template=path.read_text(encoding="utf-8"))
    with ExitStack() as stack:
        try:
            both = stack.enter_context(pair(model, chat_template=options.chat_template))
        except ModelError as error:
            check_refusal(model, options, str(error))
            return
        for name, request in REQUESTS.items():
            made = both.ask("POST", "/apply-template", request)
            more = {"max_tokens": 4, "temperature": 0, "seed": 1}
            answer = both.ask("POST", "/v1/chat/completions", {**request, **more})
            assert name != "plain" or made.status == 200, answer
